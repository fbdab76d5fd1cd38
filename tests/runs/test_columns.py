"""Laws of reading by columns: the same values as row by row, and a damaged file costs its broken lines alone."""

import json
import math
import random

import pytest

from psft.runs import RunFolder
from psft.runs.columns import read_columns, read_parquet, read_whole_rows

ROWS = [
    {"step": 1, "stage": "warmup", "nll": None, "loss": 0, "h": [1, 2], "epoch": 0.1},
    {"step": 2, "stage": "train", "nll": 1.2345678901234567, "loss": -0.5, "h": None},
    {"step": 3, "stage": "train", "nll": 1e-300, "loss": 2, "h": [3, 4], "extra": {"a": 1}},
]


def write(folder, lines):
    encoded = (line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    (folder / "metrics.jsonl").write_bytes(b"".join(encoded))
    return RunFolder(folder)


def test_values_are_those_of_the_rows_to_the_bit(tmp_path):
    """Goes red if a number passes through float32 or text, or if an absent field is not null."""
    columns = read_columns(write(tmp_path, ROWS), "metrics.jsonl")
    assert columns.values("nll") == [row["nll"] for row in ROWS]
    assert columns.numbers("loss").tolist() == [0.0, -0.5, 2.0]
    assert columns.values("h") == [[1, 2], None, [3, 4]] and columns.values("stage")[0] == "warmup"
    assert math.isnan(columns.numbers("epoch")[1]) and math.isnan(columns.numbers("stage")[0])
    assert columns.values("absent") == [None] * 3 and not columns.problems and not columns.has_torn_end


def test_a_missing_and_an_empty_file_have_no_rows(tmp_path):
    """Goes red if FileNotFoundError escapes, or pyarrow is asked to read nothing."""
    assert len(read_columns(RunFolder(tmp_path), "metrics.jsonl")) == 0
    assert len(read_columns(write(tmp_path, [b"\n \n"]), "metrics.jsonl")) == 0
    assert read_columns(RunFolder(tmp_path), "metrics.jsonl").numbers("step").tolist() == []


def test_a_torn_end_is_left_out_and_told(tmp_path):
    """Goes red if what follows the last newline is parsed."""
    columns = read_columns(write(tmp_path, [ROWS[0], ROWS[1], b'{"step": 3, "nl']), "metrics.jsonl")
    assert columns.values("step") == [1, 2] and columns.has_torn_end and not columns.problems


@pytest.mark.parametrize(
    "broken",
    [
        b'{"step": 9, "nll"\n',
        b"null\n",
        b"[1]\n",
        b"\x00\x00\x00\n",
        b'{"step": 7}{"step": 8}\n',
        b'{"a": "\xff"}\n',
        b"7\n",
    ],
)
def test_a_broken_line_costs_itself_alone(tmp_path, broken):
    """Goes red without `_looks_whole`: pyarrow ends the process on a bare null, and takes two objects for two rows."""
    columns = read_columns(write(tmp_path, [ROWS[0], broken, ROWS[1]]), "metrics.jsonl")
    assert columns.values("step") == [1, 2]
    (problem,) = columns.problems
    assert problem.startswith("metrics.jsonl:2: ")


def test_many_broken_lines_are_counted(tmp_path):
    """Goes red if each of a million broken lines is written out."""
    rows = read_whole_rows(write(tmp_path, [b"{\n"] * 9 + [ROWS[0]]), "metrics.jsonl")
    assert rows.rows == [ROWS[0]] and len(rows.problems) == 6 and "4 more" in rows.problems[-1]


def test_a_field_of_two_kinds_keeps_its_numbers(tmp_path):
    """Goes red if the whole file, or the whole column, is given up."""
    columns = read_columns(write(tmp_path, [{"step": 1, "nll": 0.5}, {"step": 2, "nll": "bad"}]), "metrics.jsonl")
    assert columns.values("nll") == [0.5, None] and "1 values of 'nll'" in columns.problems[0]


def test_damaged_files_read_as_row_by_row(tmp_path):
    """Random damage, 300 files: both ways of reading give the same steps. Goes red without the count of lines."""
    noise = random.Random(0)
    for _ in range(300):
        raw = bytearray(b"".join(json.dumps({**row, "step": i}).encode() + b"\n" for i, row in enumerate(ROWS * 2)))
        for _ in range(noise.randrange(1, 4)):
            place = noise.randrange(len(raw))
            damage = noise.choice([b"\n", b"null", b"{", b"}", b"\x00", b'"', b"\n{}\n", b"NaN", b"1e999"])
            raw[place : place + noise.randrange(0, 30)] = damage
        folder = write(tmp_path, [bytes(raw)])
        steps = [row.get("step") for row in read_whole_rows(folder, "metrics.jsonl").rows]
        kept = read_columns(folder, "metrics.jsonl").values("step")
        numbers = [float(s) for s in steps if isinstance(s, int | float) and not isinstance(s, bool)]
        assert len(kept) == len(steps) and repr([float(k) for k in kept if k is not None]) == repr(
            numbers
        )  # nan == nan


def test_a_parquet_file_that_is_not_whole_is_a_problem_and_no_error(tmp_path):
    """Goes red if pyarrow's error escapes."""
    assert len(read_parquet(RunFolder(tmp_path), "clipped_tokens.parquet")) == 0
    (tmp_path / "clipped_tokens.parquet").write_bytes(b"PAR1 and no more")
    columns = read_parquet(RunFolder(tmp_path), "clipped_tokens.parquet")
    assert len(columns) == 0 and columns.problems[0].startswith("clipped_tokens.parquet: cannot be read")
