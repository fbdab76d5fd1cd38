"""Laws of `prepare_dataset`: every source gives the same rows, bad input one clear error, nothing is lost."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from psft.data import final_answer, prepare_dataset
from psft.data.sources import read_rows
from psft.errors import RequestError

ROWS = [{"question": f"{i} + 1 = ?", "answer": f"It is {i + 1}, é.\n#### {i + 1}"} for i in range(12)]


@pytest.fixture
def prepare(tiny_tokenizer, tmp_path: Path):
    def prepare(source: Any, **options: Any) -> Any:
        return prepare_dataset(str(source), **{"tokenizer": tiny_tokenizer, "max_length": 512, **options})

    return prepare


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def write_source(kind: str, folder: Path) -> Path:
    import datasets

    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        write_lines(path, ROWS)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "data.json":
        path.write_text(json.dumps({"data": ROWS}))
    elif kind == "lines.json":
        write_lines(path, ROWS)
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as text:
            writer = csv.DictWriter(text, ["question", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    return path


KINDS = ["jsonl", "jsonl.gz", "json", "data.json", "lines.json", "parquet", "csv", "saved", "saved_dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_rows(kind, prepare, tmp_path):
    """Goes red if a reader drops, reorders or alters a row."""
    expected = prepare(write_source("jsonl", tmp_path))
    found = prepare(write_source(kind, tmp_path))
    assert found.dataset[:] == expected.dataset[:]
    assert found.report.num_used == 12 and found.report.format == "question-answer"


def test_rows_know_their_line_even_after_blank_lines_and_line_breaks_in_cells(tmp_path):
    """Goes red if lines are counted from 0, blank lines are not counted, or csv records are taken for lines."""
    lines = write_lines(tmp_path / "a.jsonl", [ROWS[0], "", ROWS[1]])
    assert [row.line for row in read_rows(str(lines))] == [1, 3]
    assert [row.line for row in read_rows(str(write_source("csv", tmp_path)))] == list(range(2, 26, 2))
    assert [row.line for row in read_rows(str(write_source("parquet", tmp_path)))] == list(range(1, 13))


def test_report_counts_are_those_of_the_data_set(prepare, tmp_path):
    """Goes red if a count of the report is not what the columns hold."""
    prepared = prepare(write_source("jsonl", tmp_path), max_rows=10)
    lengths = sorted(len(ids) for ids in prepared.dataset["input_ids"])
    report = prepared.report.to_dict()
    assert (report["num_rows"], report["num_used"], report["num_rejected"], report["num_truncated"]) == (10, 10, 0, 0)
    assert report["num_tokens"] == sum(lengths)
    assert report["num_trained_tokens"] == sum(x != -100 for row in prepared.dataset["labels"] for x in row)
    assert report["length_quantiles"] == {"p50": lengths[5], "p95": lengths[9], "max": lengths[9]}
    assert report["end_token"] == "<|im_end|>" and report["reasons"] == {}
    json.dumps(report)


def test_truncation_keeps_the_start_and_is_counted(prepare, tmp_path):
    """Goes red if the end is kept, or a cut row is not counted."""
    source = write_source("jsonl", tmp_path)
    whole = prepare(source).dataset
    limit = max(map(len, whole["input_ids"])) - 3
    cut = prepare(source, max_length=limit)
    assert cut.dataset["input_ids"] == [ids[:limit] for ids in whole["input_ids"]]
    assert cut.dataset["labels"] == [labels[:limit] for labels in whole["labels"]]
    assert cut.report.num_truncated == sum(len(ids) > limit for ids in whole["input_ids"]) > 0


def bad_rows() -> list[Any]:
    return [ROWS[0], "{not json", {"question": "x", "answer": ""}, {"question": "y" * 3000, "answer": "z"}, ROWS[1]]


def test_skipped_rows_are_recorded_with_file_line_and_reason(prepare, tmp_path):
    """Goes red if a bad row vanishes without a record or takes a good one with it."""
    source = write_lines(tmp_path / "a.jsonl", bad_rows())
    rejected_path = tmp_path / "run" / "rejected.jsonl"
    prepared = prepare(source, on_bad_row="skip", rejected_path=rejected_path)
    rejected = [json.loads(line) for line in rejected_path.read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rejected] == [(str(source), 2), (str(source), 3), (str(source), 4)]
    assert [row["reason"].split(" (")[0] for row in rejected] == list(prepared.report.reasons)
    assert list(prepared.report.reasons) == ["not JSON", "empty answer", "no answer token within max_length=512"]
    assert rejected[0]["row"] == "{not json" and len(rejected[2]["row"]) <= 400
    assert (prepared.report.num_rows, prepared.report.num_used, prepared.report.num_rejected) == (5, 2, 3)
    assert len(prepared.dataset) == 2


def test_a_bad_row_stops_by_default_and_is_still_recorded(prepare, tmp_path):
    """Goes red if the error lacks the line, the reason or the way out, or rejected.jsonl is missing."""
    source = write_lines(tmp_path / "a.jsonl", bad_rows())
    with pytest.raises(RequestError) as caught:
        prepare(source, rejected_path=tmp_path / "rejected.jsonl")
    message = str(caught.value)
    assert f"{source}:2: not JSON" in message and "3 of 5 rows" in message and "--on_bad_row skip" in message
    assert "\n" not in message
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 3


def test_the_error_lists_the_first_ten_bad_rows_and_counts_the_others(prepare, tmp_path):
    """Goes red if a file of a thousand bad rows prints them all, or hides how many there are."""
    source = write_lines(tmp_path / "a.jsonl", [ROWS[0], *["x"] * 13])
    with pytest.raises(RequestError, match="13 of 14 rows.*and 3 more") as caught:
        prepare(source)
    assert str(caught.value).count(": not JSON") == 10


def test_all_rows_too_long_is_one_error_whatever_on_bad_row_says(prepare, tmp_path):
    """Goes red if an empty data set comes out."""
    source = write_source("jsonl", tmp_path)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(RequestError, match="all 12 rows are longer than max_length=8.*Raise --max_length"):
            prepare(source, max_length=8, on_bad_row=on_bad_row)


def test_no_usable_row_is_an_error_under_skip_too(prepare, tmp_path):
    """Goes red if training would start without data."""
    source = write_lines(tmp_path / "a.jsonl", ["{", "["])
    with pytest.raises(RequestError, match="none of its 2 rows can be used.*not JSON"):
        prepare(source, on_bad_row="skip")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("some/folder/missing", None, "cannot be loaded|does not exist"),
        ("a b?", None, "does not exist"),
        ("empty.jsonl", b"", "empty file"),
        ("blank.jsonl", b"\n \n", "holds no row"),
        ("list.json", b"[]", "holds no row"),
        ("number.json", b"3", "holds a JSON int"),
        ("broken.json", b"[{", "is not JSON"),
        ("broken.jsonl.gz", b"no gzip", "damaged gzip"),
        ("torn.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], "damaged gzip"),
        ("broken.parquet", b"PAR1", "not a readable parquet"),
        ("latin.csv", "text\né".encode("latin-1"), "not UTF-8"),
        ("header.csv", b"text\n", "holds no row"),
        ("notes.txt", b"hello", "unknown kind.*jsonl.gz"),
        ("folder/x.jsonl", b"{}", None),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line_with_what_and_where(name, content, expected, prepare, tmp_path):
    """Goes red if a traceback, or a message without the name, is what a person gets."""
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    if expected is None:
        path, expected = path.parent, "no data set.*save_to_disk"
    with pytest.raises(RequestError, match=expected) as caught:
        prepare(path)
    assert Path(name).parts[0] in str(caught.value) and "\n" not in str(caught.value)


def test_lines_that_are_not_utf8_are_bad_rows(prepare, tmp_path):
    """Goes red if one wrong byte stops the reading of a file."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n\xef\xbb\xbf\n{"text": "fine"}\n')
    report = prepare(path, on_bad_row="skip").report
    assert report.num_used == 1 and "not UTF-8 text" in report.reasons


def test_a_byte_order_mark_is_no_bad_row(prepare, tmp_path):
    """Goes red if files saved by Windows editors lose their first row."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "fine"}\n')
    assert prepare(tmp_path / "a.jsonl").report.num_used == 1


def test_a_hub_data_set_that_cannot_be_reached_is_a_request_error(prepare, monkeypatch):
    """Goes red if a network error reaches the person as a traceback."""
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(RequestError, match="org/name is no local file.*ConnectionError: no network.*Check"):
        prepare("org/name")


def test_a_hub_data_set_gets_its_split_and_configuration(prepare, monkeypatch):
    """Goes red if split or config_name is lost on the way."""
    import datasets

    asked = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert prepare("org/name", split="test", config_name="main").report.num_used == 12
    assert asked == [(("org/name", "main"), {"split": "test"})]


def test_a_missing_split_names_those_there_are(prepare, tmp_path):
    """Goes red if the person has to guess."""
    with pytest.raises(RequestError, match="no split 'test'; it has 'train'"):
        prepare(write_source("saved_dict", tmp_path), split="test")


@pytest.mark.parametrize("options", [{"on_bad_row": "ignore"}, {"max_rows": 0}, {"max_length": 1}])
def test_settings_out_of_range_are_refused(options, prepare, tmp_path):
    """Goes red if a wrong value is taken silently."""
    with pytest.raises(RequestError, match=next(iter(options))):
        prepare(write_source("jsonl", tmp_path), **options)


def test_bundled_demonstrations_are_worked_solutions_that_can_be_graded(prepare):
    """Goes red if an answer lacks its final line, or the same source gives other rows the second time."""
    pytest.importorskip("reasoning_gym")
    source = "reasoning-gym:gsm_symbolic?size=150&seed=3"
    rows = [row.value["messages"] for row in read_rows(source)]
    assert rows == [row.value["messages"] for row in read_rows(source)] and len(rows) == 150
    for user, assistant in rows:
        assert user["role"] == "user" and len(assistant["content"].splitlines()) > 1
        assert assistant["content"].endswith(f"#### {final_answer(assistant['content'])}")
    assert rows != [row.value["messages"] for row in read_rows("reasoning-gym:gsm_symbolic?size=150&seed=4")]
    assert prepare(source, max_length=None).report.num_used == 150


@pytest.mark.parametrize("source", ["nothing", "gsm_symbolic?sise=3", "gsm_symbolic?size=x", "gsm_symbolic?size=0"])
def test_a_wrong_demonstration_source_is_refused(source, prepare):
    """Goes red if a misspelt option falls back to a default."""
    with pytest.raises(RequestError, match="gsm_symbolic"):
        prepare(f"reasoning-gym:{source}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so\n#### 42", "42"),
        ("#### $1,234.50 dollars", "1234.5"),
        ("#### 8.0", "8"),
        ("#### -007", "-7"),
        ("#### 0.00", "0"),
        ("#### -0", "0"),
        ("#### 1\n#### 2", "2"),
        ("#### x = .5", "0.5"),
        ("the answer is 42", None),
        ("#### none", None),
        ("####\n42", None),
        ("", None),
    ],
)
def test_final_answer_reads_the_number_after_the_last_mark(text, expected):
    """Goes red if spelling (commas, .0, units) makes equal numbers unequal."""
    assert final_answer(text) == expected


TRAIN_FILES = {  # file: format, rows, rows with an empty answer, columns
    "gsm8k_train.jsonl": ("question-answer", 7473, 0, {}),
    "math_cot_correct_demos.jsonl": ("prompt-demonstration", 418, 0, {}),
    "ultrafeedback_binarized_sample_eval200.jsonl": ("prompt-completion", 200, 0, {"completion": "chosen"}),
    "ultrafeedback_binarized_sample_train1000.jsonl": ("prompt-completion", 1000, 1, {"completion": "chosen"}),
    "math8k_prompts.jsonl.gz": ("prompt-completion", 8523, 2, {"completion": "answer"}),
}


@pytest.mark.parametrize("name", TRAIN_FILES)
def test_real_training_files_are_read_whole(name, prepare, shared_data):
    """Goes red if a row of a real file is lost, a bad one passes, or a format is not recognised."""
    format, num_rows, num_empty, columns = TRAIN_FILES[name]
    report = prepare(shared_data / "train" / name, max_length=None, columns=columns, on_bad_row="skip").report
    assert (report.format, report.num_rows, report.num_used) == (format, num_rows, num_rows - num_empty)
    assert report.reasons == ({"empty answer": num_empty} if num_empty else {})


def test_generated_demonstrations_are_named_by_what_they_follow_from(monkeypatch):
    """The data cache knows them by it. Goes red if the seed, or the generator's version, is left out."""
    from psft.data import demonstrations
    from psft.data.sources import open_source

    first = "reasoning-gym:gsm_symbolic?size=4&seed=1"
    assert open_source(first).digest() == open_source(first).digest()
    assert open_source(first).digest() != open_source(first.replace("seed=1", "seed=2")).digest()
    before = open_source(first).digest()
    monkeypatch.setattr(demonstrations.importlib.metadata, "version", lambda name: "99")
    assert open_source(first).digest() != before


def test_splits_of_a_folder_have_names_of_their_own(tmp_path):
    """The data cache knows them by it. Goes red if two splits of one folder share a name."""
    from psft.data.sources import open_source

    path = write_source("saved_dict", tmp_path)
    assert open_source(str(path), split="train").digest() != open_source(str(path), split="test").digest()
