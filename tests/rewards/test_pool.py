"""Workers: what a row may do to them, and what it may not do to the rows beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from psft.errors import RequestError, RunFailed
from psft.rewards import get_grader, grade_rows, pool

OWN = "graders_that_misbehave:Misbehaving"


@pytest.fixture(autouse=True)
def _own_grader_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def graded(*responses: str, **settings):
    return list(grade_rows(OWN, [{"response": response} for response in responses], **settings))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("loop", "timed out after 0.3 s"),
        ("endless product", "timed out after 0.3 s"),
        ("die", "its worker process died over it (SIGKILL)"),
        ("leave", "its worker process died over it (code 3)"),
        ("fail", "could not be graded: ArithmeticError: no such number"),
        ("eat", "needed more than 4 GiB of memory"),
    ],
)
def test_a_row_costs_itself_alone(how, reason):
    """Goes red without either timer, without the replacement, or if the rows told ahead go down with the worker."""
    grades = graded("fine", "fine", how, "fine", how, "fine", num_workers=1, time_limit=0.3)
    assert [grade.score for grade in grades] == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert (grades[2].reason, grades[2].extracted) == (reason, None) and grades[4] == grades[2]
    assert grades[2].is_timed_out == reason.startswith("timed out")


def test_a_silent_worker_is_ended(monkeypatch):
    """Goes red if only processor time counts: a row that sleeps would hold up everything."""
    monkeypatch.setattr(pool, "SILENCE_S", 0.5)
    grades = graded("fine", "sleep", "fine", num_workers=1, time_limit=0.1)
    assert [grade.score for grade in grades] == [1.0, 0.0, 1.0] and grades[1].is_timed_out


def test_grades_come_in_order_from_several_workers_that_end_with_them():
    """Goes red if a dead worker's last words are not heard, so that another row is taken for the one it died over."""
    rows = ["leave" if n % 20 == 7 else "fine" for n in range(100)]
    grades = graded(*rows, num_workers=2)
    assert [grade.score for grade in grades] == [float(row == "fine") for row in rows]
    workers = {int(grade.extracted) for grade in grades if grade.extracted}
    assert len(workers) > 2 and not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_rows_are_read_as_they_are_needed_and_workers_end_with_their_reader(monkeypatch):
    """Goes red if all rows are read first, or an abandoned reader leaves its workers running."""
    monkeypatch.setattr(pool, "PENDING", 50)
    num_read = 0

    def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield {"response": "fine"}

    grades = grade_rows(OWN, endless(), num_workers=1)
    worker = int(next(grades).extracted or 0)
    assert num_read <= 51 and Path(f"/proc/{worker}").exists()
    grades.close()  # type: ignore[attr-defined]
    assert not Path(f"/proc/{worker}").exists()


def test_a_row_larger_than_a_socket_holds_is_graded():
    """Goes red if the parent waits for room while the worker waits for the parent."""
    rows = [{"response": "fine", "note": "x" * 3_000_000} for _ in range(20)]
    assert all(grade.score for grade in grade_rows(OWN, rows, num_workers=2))


def test_a_worker_that_cannot_start_is_a_failed_run():
    """Goes red if it is started again and again."""
    with pytest.raises(RunFailed, match="ended with code 3 as it started"):
        graded("fine", num_workers=1, at_start="leave")


def test_graders_of_ones_own_are_imported_or_named_as_what_is_wrong():
    """Goes red if a path is taken for a misspelt name, or a missing class ends in a traceback."""
    assert get_grader(OWN, at_start="fine").name == "misbehaving"
    with pytest.raises(RequestError, match="cannot be imported: No module named 'nowhere'"):
        get_grader("nowhere:Grader")
    with pytest.raises(RequestError, match="has no attribute 'Missing'"):
        get_grader("graders_that_misbehave:Missing")
    assert list(grade_rows(OWN, [], num_workers=1)) == []
