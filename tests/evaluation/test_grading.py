"""Laws of grading while answers are made: grades come as soon as they can, and a stop is a stop."""

from __future__ import annotations

import threading
import time

import pytest

from psft.evaluation.benchmarks import Benchmark
from psft.evaluation.grading import Grades, LiveGrading
from psft.evaluation.items import Data, Item
from psft.evaluation.samples import KeyedFile

PATIENCE_S = 120
"""For what must happen at all; a machine at rest needs a second or two."""


def grades(tmp_path, kind="math", gold="4"):
    items = tuple(Item(f"q{i}", "2 + 2?", (), {"gold": gold}) for i in range(3))
    return Grades(Data(Benchmark("b", kind, "f"), items, "f", "0", 3), KeyedFile(tmp_path / "grades.jsonl"))


def sample(i, response=r"\boxed{4}"):
    return {"key": f"k{i}", "benchmark": "b", "item": f"q{i}", "index": 0, "response": response}


def test_a_grade_does_not_wait_for_more_samples(tmp_path):
    """The second sample is made when the first has its grade. Goes red if workers are given rows by the dozen."""
    seen, is_graded = [], threading.Event()

    def note(row):
        seen.append((row["item"], row["score"]))
        is_graded.set()

    live = LiveGrading(grades(tmp_path), note)
    for i in range(3):
        live.put(sample(i))
        assert is_graded.wait(PATIENCE_S), "no grade came while nothing was put"
        is_graded.clear()
    live.finish()
    assert seen == [("q0", 1.0), ("q1", 1.0), ("q2", 1.0)]


def test_what_is_stopped_does_not_wait_for_grades(tmp_path, monkeypatch):
    """Goes red if a stop grades all that was put first, or leaves the thread to write a closed file."""
    monkeypatch.setattr("psft.evaluation.grading._LONGEST_STOP_S", PATIENCE_S)  # a worker may be slow to start
    made = grades(tmp_path)
    live = LiveGrading(made, lambda row: time.sleep(0.01))
    for i in range(3000):
        live.put({**sample(i % 3), "key": f"k{i}"})
    live.stop()
    assert not live._thread.is_alive() and len(made.file) < 3000


def test_what_goes_wrong_in_the_thread_is_raised(tmp_path):
    """A full disk. Goes red if the thread dies in silence."""
    made = grades(tmp_path, "choice", "A")
    made.file.append = lambda rows: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    live = LiveGrading(made, print)
    live.put(sample(0, "Answer: A"))
    with pytest.raises(OSError, match="No space left"):
        live.finish()
