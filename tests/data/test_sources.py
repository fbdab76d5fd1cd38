"""Hostile files: each is read exactly, has its bad rows listed with place and reason, or is one clear error."""

from __future__ import annotations

import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from psft.data import Prepared, prepare_dataset, render_example
from psft.data import files as files_module
from psft.data.rows import Rejection, Row, RowRejected
from psft.data.sources import read_rows
from psft.data.validate import MAX_MESSAGES
from psft.errors import RequestError

GOOD = {"question": "How many?", "answer": "3 clips."}


@pytest.fixture
def read(tiny_tokenizer, tmp_path: Path):
    """read(name, content, **options) -> (Prepared, rejected rows); bad rows are skipped."""

    def read(name: str, content: bytes, **options: Any) -> tuple[Prepared, list[dict[str, Any]]]:
        path, rejected = tmp_path / name, tmp_path / "rejected.jsonl"
        path.write_bytes(content)
        options = {"max_length": None, "on_bad_row": "skip", **options}
        prepared = prepare_dataset(str(path), tokenizer=tiny_tokenizer, rejected_path=rejected, **options)
        assert prepared.report.num_rows == prepared.report.num_used + prepared.report.num_rejected
        rows = [json.loads(line) for line in rejected.open()] if rejected.exists() else []
        assert len(rows) == prepared.report.num_rejected
        return prepared, rows

    return read


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.mark.parametrize(
    "text",
    [
        "\x00\x01\x1b[31m\x7f",
        "\u202eright to left\u202c \u200f\u2066",
        "\ufeff\u200b\u200d\ufffd\u2028\u0085",
        "e\u0301 ﷺ 😀\u200d🔥 \U0010ffff\U000f0000\ue000",
        "line\r\nline\rline\tend",
        "word " * 200_000,
        "x" * 1_000_000,
    ],
    ids=["control", "direction", "invisible", "composed", "line ends", "a megabyte of words", "a megabyte of x"],
)
def test_unusual_text_reaches_the_tokens_unchanged(text, read, tiny_tokenizer):
    """Goes red if text is stripped, normalised or cut on its way, in any role."""
    rows = [{"messages": [{"role": "user", "content": f"a{text}b"}, {"role": "assistant", "content": f"a{text}b"}]}]
    prepared, _ = read("a.jsonl", lines(*rows))
    (ids,), (labels,) = prepared.dataset["input_ids"], prepared.dataset["labels"]
    assert tiny_tokenizer.decode(ids) == tiny_tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert tiny_tokenizer.decode([label for label in labels if label != -100]) == f"a{text}b<|im_end|>"


def test_an_example_cannot_steer_the_terminal(read, tiny_tokenizer):
    """Goes red if `psft plan` prints the control and direction characters of a data set as they are."""
    prepared, _ = read("a.jsonl", lines({"question": "a\x1b[2J\nb", "answer": "\u202ec"}))
    shown = render_example(prepared, tiny_tokenizer)
    assert "a\\x1b[2J\nb" in shown and "\\u202ec" in shown and "\x1b" not in shown


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"question": "q", "answer": "\\ud800"}', "'answer' holds a broken character (a lone surrogate"),
        (b'{"question": "q", "answer": "a", "answer": "b"}', "a key is given twice ('answer')"),
        (b'{"question": "q", "answer": "a", "meta": [{"k": 1, "k": 2}]}', "a key is given twice ('k')"),
        (b'{"question": "q", "answer": "a", "meta": ' + nested(10_000) + b"}", "not JSON (nested too deeply)"),
        (b'{"question": "q", "answer": ' + nested(900) + b"}", "'answer' holds a part that is not text ('list')"),
        (b'{"question": "q", "answer": 1' + b"0" * 5000 + b"}", "not JSON (Exceeds the limit (4300 digits)"),
        (b'{"question": "q", "answer": NaN}', "'answer' is not text (a float)"),
        (b'{"question": "q", "answer": true}', "'answer' is not text (a bool)"),
        (b'{"question": "q", "answer": null}', "field 'answer' is missing"),
        (b'{"question": "q", "answer": {"a": 1}}', "'answer' is not text (a dict)"),
        (b'{"question": "q", "answer": [1]}', "'answer' holds a part that is not text ('int')"),
        (b'{"question": "q", "answer": "a"', "not JSON (Expecting ',' delimiter, character 32)"),
        (b'{"question": "q", "answer": "a\x00"}', "not JSON (Invalid control character"),
        (b'{"question": "q", "answer": "\xff"}', "not UTF-8 text (byte 0xff, number 30 of the line)"),
        ('{"question": "q", "answer": "a"}'.encode("utf-16-le"), "not JSON"),
        (b'["question", "answer"]', "not an object with fields (a JSON list)"),
        (b"0", "not an object with fields (a JSON int)"),
    ],
)
def test_a_hostile_row_is_rejected_with_file_line_and_reason_and_its_neighbours_are_used(row, reason, read, tmp_path):
    """Goes red if it is used, replaced, stops the file, or takes a neighbour with it."""
    prepared, rejected = read("a.jsonl", lines(GOOD, row, GOOD))
    assert prepared.report.num_used == 2
    (found,) = rejected
    assert (found["file"], found["line"]) == (str(tmp_path / "a.jsonl"), 2) and found["reason"].startswith(reason)


@pytest.mark.parametrize(
    "extra", [b"NaN", b"-Infinity", b"1e999", b"12345678901234567890123", b'"\\ud800"', nested(200)]
)
def test_a_field_that_nobody_reads_may_hold_anything_json_has(extra, read):
    """Goes red if a row is lost for a score of NaN that other programs write."""
    prepared, _ = read("a.jsonl", lines(b'{"question": "q", "answer": "a", "score": ' + extra + b"}"))
    assert prepared.report.num_used == 1


def test_a_row_that_json_cannot_show_can_be_recorded():
    """Goes red if the excerpt in rejected.jsonl is made with plain json.dumps: RecursionError, TypeError."""
    deep: Any = "end"
    for _ in range(5000):
        deep = [deep]
    for value in (deep, {b"key": 1}, 10**5000):
        rejection = Rejection.of(Row("a.parquet", 1, value), RowRejected("no reason"))
        assert "cannot show" in json.loads(rejection.to_json())["row"]


@pytest.mark.parametrize("field", [b'"input"', b'"instruction"'])
def test_a_deep_field_of_an_instruction_is_rejected(field, read):
    """Goes red if the field is turned into text before its type is looked at: RecursionError."""
    other = b'"instruction"' if field == b'"input"' else b'"input"'
    row = b'{"output": "a", ' + other + b': "b", ' + field + b": " + nested(950) + b"}"
    good = {"instruction": "a", "input": "", "output": "b"}
    with ThreadPoolExecutor(1) as fresh_stack:  # what runs the tests has frames of its own, and 950 leave few to spare
        _, rejected = fresh_stack.submit(read, "a.jsonl", lines(good, row)).result()
    assert "part that is not text" in rejected[0]["reason"]


def test_a_conversation_of_endless_turns_is_rejected(read):
    """Goes red without MAX_MESSAGES: rendering takes the square of the turns, hours for a file of a few megabytes."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * (MAX_MESSAGES // 2 + 1)
    _, rejected = read("a.jsonl", lines({"messages": turns[:4]}, {"messages": turns}))
    assert "too many messages" in rejected[0]["reason"]


def test_messages_written_as_json_text_may_not_give_a_key_twice(read):
    """Goes red if the text of a cell is parsed with the last key winning."""
    chat = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]'
    _, rejected = read("a.jsonl", lines({"messages": chat.replace(', "content": "b"', "")}, {"messages": chat}))
    assert rejected[0]["reason"].startswith("a key is given twice")


def test_line_ends_and_byte_order_marks_make_no_difference(read):
    """Goes red if CRLF or a mark at the start of the file reaches the text or loses a row."""
    expected, _ = read("a.jsonl", lines(GOOD, GOOD))
    for content in (lines(GOOD, GOOD).replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + lines(GOOD, GOOD)):
        assert read("a.jsonl", content)[0].dataset[:] == expected.dataset[:]
    csv = b"question,answer\r\nHow many?,3 clips.\r\nHow many?,3 clips.\r\n"
    for content in (csv, csv.replace(b"\r\n", b"\n"), csv.replace(b"\r\n", b"\r"), b"\xef\xbb\xbf" + csv):
        assert read("a.csv", content)[0].dataset[:] == expected.dataset[:]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "x".encode("utf-16"), r"a\.jsonl:1: byte 1 begins UTF-16 text. Save the file as UTF-8"),
        ("a.json", "[]".encode("utf-16"), "UTF-16"),
        ("a.csv", "text\na".encode("utf-16"), "UTF-16"),
        ("a.json", b'[\n{"text": "\xff"}]', r"a\.json:2: not UTF-8 text \(byte 0xff, number 11 of the line\)"),
        ("a.csv", b"text\nfine\nb\xe9", r"a\.csv:3: not UTF-8 text \(byte 0xe9, number 2 of the line\)"),
        ("a.json", nested(10_000), "is not JSON: nested too deeply"),
        (
            "a.json",
            b'{"data": [{"text": "a"}], "data": [{"text": "b"}]}',
            "the key 'data' that holds the rows is given",
        ),
        ("a.jsonl.gz", gzip.compress(lines(*[GOOD] * 500), mtime=0)[:-12] + b"\0" * 12, "is a damaged gzip file"),
        ("a.csv", b'question,answer\nq,"a\nq,a\nq,a\n', r"a\.csv:2: a quote is opened in this row and never closed"),
        ("a.csv", b"question,answer,question\nq,a,b\n", r"a\.csv:1: the header names the column 'question' twice"),
        ("a.csv", b'"question"x,answer\nq,a\n', r"a\.csv:1: not a readable CSV header"),
        ("a.parquet", b"PAR1" + b"\0" * 99 + b"PAR1", "not a readable parquet file"),
        ("a.jsonl", b"\n\n", "holds no row"),
        ("a\nb\x1b[2J.jsonl", b"", r"a\\nb\\x1b\[2J\.jsonl is an empty file"),
    ],
)
def test_a_file_whose_rows_cannot_be_told_apart_is_one_line(name, content, expected, read):
    """Goes red if a traceback comes through, or a file is read in part without a word."""
    with pytest.raises(RequestError, match=expected) as caught:
        read(name, content)
    assert str(caught.value).isprintable()


def test_a_record_with_broken_quotes_is_rejected_alone(read):
    """Goes red if csv.Error ends the file, or python's lenient reading gives the cell another text."""
    content = b'question,answer\nq,a\n"q"uote,a\nq,"a ""b"" c"\nq,a,b\nq\n'
    prepared, rejected = read("a.csv", content)
    assert prepared.report.num_used == 2 and [row["line"] for row in rejected] == [3, 5, 6]
    assert [row["reason"].split(" (")[0] for row in rejected] == [
        "broken CSV quoting", "more values than the header has columns", "field 'answer' is missing",
    ]  # fmt: skip


def test_a_line_without_end_does_not_fill_the_memory(read, monkeypatch):
    """Goes red without the limit: a gzip of a few kilobytes unpacks to gigabytes."""
    monkeypatch.setattr(files_module, "_LINE_LIMIT", 1 << 20)
    with pytest.raises(RequestError, match=r"a\.jsonl\.gz:2: the line is longer than 1 MiB"):
        read("a.jsonl.gz", gzip.compress(lines(GOOD) + b" " * (1 << 21)))


def test_rows_of_a_json_file_may_not_give_a_key_twice(read):
    """Goes red if only lines are looked at: a .json file is parsed in one go."""
    content = b'[{"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "answer": "b"}]'
    _, rejected = read("a.json", content)
    assert [(row["line"], row["reason"]) for row in rejected] == [(2, "a key is given twice ('answer')")]


def test_parquet_values_that_python_cannot_hold_are_rows_with_a_problem(read, tmp_path):
    """Goes red if one text that is not UTF-8, or one date, makes the other rows of the file unreadable."""
    import pyarrow as pa
    import pyarrow.parquet

    wrong = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    questions = pa.array(["q", "q", "q"])
    pyarrow.parquet.write_table(pa.table({"question": questions, "answer": wrong}), tmp_path / "b.parquet")
    prepared, rejected = read("a.parquet", (tmp_path / "b.parquet").read_bytes())
    assert prepared.report.num_used == 2
    assert rejected[0]["line"] == 2 and rejected[0]["reason"].startswith("a value that cannot be read")
    twice = pa.Table.from_arrays([questions, questions], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(RequestError, match="has two columns named 'text'"):
        read("a.parquet", (tmp_path / "b.parquet").read_bytes())


def test_a_damaged_saved_folder_is_a_request_error(tiny_tokenizer, tmp_path):
    """Goes red if pyarrow's exception comes through while rows are read."""
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list([GOOD] * 2000).save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(RequestError, match="saved"):
        prepare_dataset(str(folder), tokenizer=tiny_tokenizer, max_length=None)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("~nobody-of-this-name/a.jsonl", "does not exist"),
        ("a\0b.jsonl", r"a\\x00b\.jsonl does not exist"),
        ("x" * 5000, "cannot be opened: File name too long"),
        ("/dev/null", "neither a file nor a folder"),
        ("a\nb", r"a\\nb does not exist"),
        ("reasoning-gym:gsm_symbolic?size=" + "9" * 5000, "reasoning-gym:gsm_symbolic"),
    ],
)
def test_an_impossible_name_is_one_line(source, expected):
    """Goes red if the operating system's exception, or the name's line break, comes through."""
    with pytest.raises(RequestError, match=expected) as caught:
        list(read_rows(source))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_file_that_may_not_be_read_is_a_request_error(name, read, tmp_path):
    """Goes red if PermissionError comes through."""
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / name).chmod(0)
    with pytest.raises(RequestError, match="cannot be read: Permission denied"):
        list(read_rows(str(tmp_path / name)))


def test_field_names_from_a_file_are_shown_on_one_line(read):
    """Goes red if the fields of a hostile file reach the terminal as they are, or all of its thousands."""
    row = {f"a\x1b[2J\n{number}": 1 for number in range(1000)}
    with pytest.raises(RequestError, match="fit no known format") as caught:
        read("a.jsonl", lines(row))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000


def test_a_system_prompt_that_no_encoding_has_is_refused(read):
    """Goes red if the tokenizer's TypeError comes through."""
    with pytest.raises(RequestError, match="system_prompt holds a lone surrogate"):
        read("a.jsonl", lines(GOOD), system_prompt="\ud800")
