"""Suites as data: what is registered, what a file of one's own may say, and that nothing is fetched unasked."""

import json
from pathlib import Path

import pytest

from psft.errors import RequestError
from psft.evaluation.benchmarks import PRESETS, make_suite, packaged_suite, read_suite, suite_names
from psft.evaluation.chosen import choose
from psft.evaluation.items import OPTION_LETTERS, load_data, read_rows

MATH = [benchmark.name for benchmark in packaged_suite("math").benchmarks]
OOD = ["arc_c", "truthfulqa", "ifeval", "mmlu_pro", "headqa"]
"""Those whose data are there; GPQA and SuperGPQA are not."""


def test_the_suites_are_the_papers():
    """Goes red if a benchmark, its k or its token limit differs from tables 1 and 2."""
    found = {b.name: (b.k, b.sampling.max_tokens) for s in ("math", "ood") for b in packaged_suite(s).benchmarks}
    assert found == {
        **dict.fromkeys(["aime24", "aime25", "amc"], (32, 10_240)),
        **dict.fromkeys(["math500", "olympiad", "minerva"], (8, 10_240)),
        **dict.fromkeys(["gpqa", "arc_c", "truthfulqa"], (8, 10_240)),
        "ifeval": (8, 4_096),
        **dict.fromkeys(["mmlu_pro", "supergpqa", "headqa"], (1, 10_240)),
    }
    assert suite_names() == ["math", "ood", "quickstart", "rl-readiness", "smoke"]


@pytest.mark.parametrize("name", MATH)
def test_mathematics_is_read_as_registered(name, shared_data):
    """Goes red if a checksum, a number of rows or a field's name in the registry is wrong."""
    data = load_data(choose([name]).benchmarks[0], shared_data)
    assert data.notes == () and len(data.items) == data.benchmark.rows == data.num_rows
    assert len({item.id for item in data.items}) == len(data.items)
    assert all(item.grading["gold"] not in ("", []) for item in data.items)
    assert data.items[0].messages[0]["content"].endswith(r"final answer within \boxed{}.")
    assert data.items[0].messages[1]["content"] == data.items[0].question


@pytest.mark.parametrize("name", OOD)
def test_out_of_domain_is_read_as_registered(name, shared_data):
    """Goes red if a gold letter names no option, if options do not come into the prompt, or on a wrong checksum."""
    pytest.importorskip("psft.rewards.choice", reason="the graders are not there")
    data = load_data(choose([name]).benchmarks[0], shared_data)
    assert data.notes == () and len(data.items) == data.benchmark.rows
    assert len({item.id for item in data.items}) == len(data.items)
    for item in data.items if name != "ifeval" else ():
        letters = OPTION_LETTERS[: len(item.grading["options"])]
        assert item.grading["gold"] in letters
        assert f"\n{letters[-1]}) {item.grading['options'][-1]}" in item.messages[-1]["content"]


def test_the_right_option_of_truthfulqa_moves(shared_data):
    """Goes red without shuffling: every gold letter would be A."""
    pytest.importorskip("psft.rewards.choice", reason="the graders are not there")
    golds = [item.grading["gold"] for item in load_data(choose(["truthfulqa"]).benchmarks[0], shared_data).items]
    assert 0.1 < golds.count("A") / len(golds) < 0.4


@pytest.mark.parametrize("name", ["gpqa", "supergpqa"])
def test_absent_data_are_said_in_words_and_not_fetched(name, tmp_path, monkeypatch):
    """Goes red if the hub is asked without --download."""
    monkeypatch.setattr("psft.evaluation.items._read_hub", lambda benchmark: pytest.fail("fetched unasked"))
    with pytest.raises(RequestError, match="huggingface.co/datasets") as caught:
        load_data(choose([name]).benchmarks[0], tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_set_of_another_size_is_refused_and_another_copy_is_said(tmp_path):
    """Goes red if a truncated file passes, or if --any_rows hides it."""
    benchmark = choose(["aime24"]).benchmarks[0]
    path = tmp_path / benchmark.file
    path.parent.mkdir()
    path.write_text(json.dumps({"id": 1, "problem": "1+1?", "answer": "2"}) + "\n")
    with pytest.raises(RequestError, match="has 1 rows; AIME24 has 30"):
        load_data(benchmark, tmp_path)
    assert len(load_data(benchmark, tmp_path, any_rows=True).notes) == 2


def test_a_suite_of_ones_own(tmp_path):
    """Goes red if data beside the file are not found, if `use` loses what it changes, or if braces are filled twice."""
    (tmp_path / "mine.jsonl").write_text(json.dumps({"q": "What is {question}?", "a": 2}) + "\n")
    path = tmp_path / "own.yaml"
    path.write_text(
        "benchmarks:\n  a: {use: math/aime24, k: 4, sampling: greedy}\n"
        "  b: {kind: math, file: mine.jsonl, fields: {question: q, gold: a}, template: 'Say: {question}'}\n"
    )
    changed, own = read_suite(path).benchmarks
    assert (changed.k, changed.sampling, changed.file) == (4, PRESETS["greedy"], "math/aime24.jsonl")
    (item,) = load_data(own, None).items
    assert item.messages[-1]["content"] == "Say: What is {question}?" and item.grading == {"gold": 2}


def test_everything_wrong_with_a_suite_is_said_at_once():
    """Goes red if the first mistake hides the others, or if half a token is taken."""
    entry = {"kind": "math", "file": "f.jsonl", "fields": {"question": "q", "gold": "a"}}
    content = {"defualts": {}, "benchmarks": {"a": {**entry, "kk": 1}, "b": {"sampling": {"max_tokens": 1.5}, **entry}}}
    with pytest.raises(RequestError) as caught:
        make_suite("x", content, where="x.yaml")
    for text in ("'defualts'. Did you mean defaults?", "a: unknown key 'kk'", "max_tokens is 1.5, not a whole"):
        assert text in str(caught.value)


@pytest.mark.parametrize("content", [b"benchmarks: [", b"\xff", None])
def test_a_file_that_is_no_suite_is_refused(content, tmp_path: Path):
    """Goes red if a YAML or codec error comes through as it is."""
    path = tmp_path / "own.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match="own.yaml"):
        read_suite(path)


def test_rows_are_read_from_every_kind_of_file(tmp_path):
    """Goes red if a byte-order mark, an empty line, a gzip or a second batch of parquet is not taken."""
    import gzip

    import pyarrow
    import pyarrow.parquet

    rows = [{"q": f"é {i}", "a": str(i)} for i in range(1500)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("q,a\n" + "".join(f"{row['q']},{row['a']}\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert list(read_rows(path)) == rows, path.name
    (tmp_path / "a.txt").write_text("x")
    for name in ("a.txt", "none.csv"):
        with pytest.raises(RequestError, match=name):
            list(read_rows(tmp_path / name))
