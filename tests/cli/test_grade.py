"""`psft grade` as a person uses it: a file in, a file out, errors by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import psft
from psft.cli import grade
from psft.cli.main import main


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


CHOICES = [
    {"id": 7, "response": "Answer: B", "gold": "B", "note": "é"},
    {"id": 8, "response": "Answer: C", "gold": "B"},
    {"id": 9, "response": "I do not know", "gold": "A"},
]


def test_rows_come_back_in_order_with_score_answer_and_reason(tmp_path, capsys):
    """Goes red if a field is lost, the order changes, or a missing answer is not counted."""
    out = tmp_path / "out.jsonl"
    assert main(["grade", "--grader", "choice", write(tmp_path / "in.jsonl", CHOICES), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k in ("id", "note")} for row in rows] == [
        {"id": 7, "note": "é"}, {"id": 8}, {"id": 9},
    ]  # fmt: skip
    assert [(row["score"], row["extracted"]) for row in rows] == [(1.0, "B"), (0.0, "C"), (0.0, None)]
    assert all(row["reason"] for row in rows)
    said = capsys.readouterr().out
    assert "graded 3 answers (choice): mean score 0.3333" in said and "no answer found: 1 (33.3%)" in said


def test_mathematics_says_where_the_policies_differ(tmp_path, capsys):
    pytest.importorskip("math_verify", reason="the graders' library is in the extra `eval`")
    rows = [{"response": r"\boxed{1.60005}", "gold": "1.6"}, {"response": r"\boxed{2}", "gold": 2}]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["grade", "--grader", "math", source, "--out", str(out), "--num_workers", "1"]) == 0
    graded = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["details"] for row in graded] == [{"strict": 0.0, "psft": 1.0}, {"strict": 1.0, "psft": 1.0}]
    said = capsys.readouterr().out
    assert "(math, strict): mean score 0.5000" in said and "strict and psft differ on 1" in said
    assert main(["grade", "--grader", "math", "--policy", "psft", source, "--out", str(out)]) == 0
    assert "(math, psft): mean score 1.0000" in capsys.readouterr().out


def test_bad_rows_are_named_by_line_and_nothing_is_written(tmp_path, capsys):
    """Goes red if the first bad row hides the others, or a file from before is touched."""
    rows = [CHOICES[0], {"response": "x"}, {"gold": "A"}, *({"response": 1, "gold": "A"} for _ in range(12))]
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    assert main(["grade", "--grader", "choice", write(tmp_path / "in.jsonl", rows), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "in.jsonl:2: field 'gold' is missing" in said and "in.jsonl:3: field 'response' is missing" in said
    assert "... and 4 more" in said and out.read_text() == "before" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ('{"response": "x", "gold": "A"}\n{"resp', "in.jsonl:2: this is no line of JSON"),
        ("[1]\n", "in.jsonl:1: a JSON list"),
        (b"\xff\xfe\n", "in.jsonl:1: this is no line of JSON"),
    ],
)
def test_a_file_that_is_none_is_refused(text, words, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["grade", "--grader", "choice", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--grader", "chioce"], "Did you mean choice"),
        (["--grader", "choice", "--policy", "strict"], "no setting 'policy'"),
        (["--grader", "choice", "--bogus", "1"], "unrecognized arguments: --bogus 1"),
        (["--grader", "math", "--policy", "kind"], "strict, psft"),
        ([], "--grader"),
        (["--grader", "choice", "--num_workers", "0"], "num_workers"),
        (["--grader", "choice", "--time_limit", "0"], "time_limit"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(argv, words, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", CHOICES)
    assert main(["grade", source, "--out", str(tmp_path / "out"), *argv]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_file_that_is_read_is_not_written_over(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", CHOICES)
    assert main(["grade", "--grader", "choice", source, "--out", source]) == 2
    assert "also what is read" in capsys.readouterr().err and len((tmp_path / "in.jsonl").read_text().splitlines()) == 3
    assert main(["grade", "--grader", "choice", source, "--out", str(tmp_path / "no" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["grade", "--grader", "choice", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_nothing_is_left_where_grading_is_stopped(tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr("psft.rewards.grade_rows", stopped)
    request = grade.parse(["--grader", "choice", write(tmp_path / "in.jsonl", CHOICES), "--out", str(tmp_path / "out")])
    with pytest.raises(KeyboardInterrupt):
        grade.grade_file(request)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_torch_is_not_imported():
    """Goes red if a grader's room or the command brings it in: grading would begin seconds later."""
    code = (
        "import sys, psft.cli.grade as g, psft.rewards as r; r.get_grader('choice'); sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(psft.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
