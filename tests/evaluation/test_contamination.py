"""Laws of the contamination check: what is in the training data is found wherever it stands there, and nothing else."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psft.errors import RequestError
from psft.evaluation.benchmarks import Benchmark
from psft.evaluation.contamination import find_overlap, words
from psft.evaluation.items import Data, Item

LONG = (
    "A train leaves Lisbon at nine with 48 people and stops eleven times; how many people are on board when it "
    "reaches Porto, if a third of them leaves at each stop and none gets on?"
)
SHORT = "What is 2 + 3?"
MIDDLE = "How many primes are there below one hundred?"


def data(*questions: str, name: str = "b") -> Data:
    items = tuple(Item(f"q{i}", question, (), {}) for i, question in enumerate(questions))
    return Data(Benchmark(name, "math", "f"), items, "f", "0", len(items))


def hits(tmp_path, rows, *questions):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find_overlap([data(*questions)], str(path)).hits["b"]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"question": LONG}, "exact"),
        ({"question": f"  {LONG}\n"}, "exact"),
        ({"a": {"b": ["x", {"c": LONG.upper().replace(" ", "\n").replace(";", " --")}]}}, "normalised"),
        ({"text": f"Q: {' '.join(LONG.split()[4:17])} ..."}, "13-gram"),
        ({"text": " ".join(LONG.split()[4:16])}, None),
        ({"text": " ".join(reversed(LONG.split()))}, None),
        ({"number": 48, "none": None}, None),
    ],
)
def test_a_long_question_is_found_by_thirteen_words_in_a_row(tmp_path, row, kind):
    """Goes red if 12 words are enough, order does not count, or a field deep inside is not looked at."""
    assert hits(tmp_path, [row], LONG, MIDDLE) == ({} if kind is None else {"q0": kind})


def test_a_short_question_counts_as_a_whole_only(tmp_path):
    """Goes red if a common phrase inside a longer text is a hit; or eight words, all of them, are none."""
    inside = [{"text": f"Tell me: {SHORT} And: {MIDDLE} Thanks."}]
    assert hits(tmp_path, inside, SHORT, MIDDLE) == {"q1": "13-gram"}
    assert hits(tmp_path, [{"text": "what is 2+3"}], SHORT, MIDDLE) == {"q0": "normalised"}


def test_the_strongest_kind_is_named_and_every_benchmark_gets_its_own(tmp_path):
    """Goes red if a later, weaker hit replaces a stronger one, or one benchmark's hits are the other's."""
    rows = [{"text": f"x {LONG}"}, {"text": LONG}, {"text": f"y {LONG}"}]
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    found = find_overlap([data(LONG), data(SHORT, LONG, name="c")], str(tmp_path / "train.jsonl.gz"))
    assert found.hits == {"b": {"q0": "exact"}, "c": {"q1": "exact"}} and found.num_rows == 3


@given(st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "Omega", "7"]), min_size=0, max_size=60))
def test_thirteen_words_are_found_exactly_where_they_stand(text):
    """Few words, so runs nearly match. Against a search by strings. Goes red if hashes of unequal runs are equal."""
    from psft.evaluation.contamination import _Index

    question = "alpha beta alpha beta gamma alpha beta alpha beta alpha delta alpha omega beta"
    index = _Index()
    index.add(("b", "q"), question)
    index.close()
    found = words(question)
    runs = [" ".join(found[i : i + 13]) for i in range(len(found) - 12)]
    for candidate in (text, text + question.split(), [*text[:5], *question.split()[1:], *text[5:]]):
        joined = f" {' '.join(words(' '.join(candidate)))} "
        kinds = {kind for _, kind in index.look_up(" ".join(candidate))}
        assert ("13-gram" in kinds) == any(f" {run} " in joined for run in runs)


def test_every_source_that_can_be_trained_on_can_be_looked_through(tmp_path):
    """The question of a generated demonstration, a saved folder, CSV. Goes red if files of one kind alone are read."""
    from datasets import Dataset

    from psft.data.sources import read_rows as rows_of

    generated = "reasoning-gym:gsm_symbolic?size=5&seed=3"
    question = [row.value for row in rows_of(generated)][4]["messages"][0]["content"]
    assert find_overlap([data(question, LONG)], generated).hits == {"b": {"q0": "exact"}}
    Dataset.from_list([{"prompt": LONG, "completion": "16"}]).save_to_disk(tmp_path / "saved")
    assert find_overlap([data(LONG)], str(tmp_path / "saved")).hits == {"b": {"q0": "exact"}}
    (tmp_path / "train.csv").write_text(f'prompt,completion\n"{LONG}",16\n')
    assert find_overlap([data(LONG)], str(tmp_path / "train.csv")).hits == {"b": {"q0": "exact"}}


def test_rows_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    """Goes red if a broken line ends it, is passed over in silence, or data of which nothing is readable pass."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"a": "b"}\n{"a": "\xff"}\n' + json.dumps({"text": LONG}).encode() + b"\n")
    found = find_overlap([data(LONG)], str(path))
    assert (found.hits, found.num_rows, found.num_unreadable) == ({"b": {"q0": "exact"}}, 2, 1)
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(RequestError, match=r"none of the 1 rows of .*train\.jsonl can be read"):
        find_overlap([data(LONG)], str(path))
    with pytest.raises(RequestError, match="none.jsonl does not exist"):
        find_overlap([data(LONG)], str(tmp_path / "none.jsonl"))
