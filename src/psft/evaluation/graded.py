"""Samples made and graded side by side, and every sample of a benchmark with its grade, by item."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from psft.evaluation.backends import Backend
from psft.evaluation.generate import Generated, Plan, generate
from psft.evaluation.grading import GradeRow, Grades, LiveGrading
from psft.evaluation.progress import Progress
from psft.evaluation.results import ItemScores
from psft.evaluation.samples import KeyedFile


def generate_graded(
    plan: Plan,
    backend: Backend,
    samples: KeyedFile,
    grades: Grades,
    *,
    title: str,
    stream: TextIO | None = None,
    was_stopped: Callable[[], bool] = bool,
) -> Generated:
    """Make what is missing, grading along the way. Whatever ends it, what came so far is in the files.

    The backend is asked where all is there, too: the other ranks of a training run wait for its answer.

    Args:
        title, stream: of the line of progress. was_stopped: whether the backend left off before the last sample.
    """
    num_missing = sum(request.key not in samples for request in plan.requests)
    progress = Progress(title, len(plan.requests), len(plan.requests) - num_missing, stream=stream)
    if not num_missing:
        return generate(plan, backend, samples, progress, lambda row: None)

    def show(grade: GradeRow) -> None:
        progress.scored(grade["item"], grade["score"])

    for request in plan.requests:
        grade = grades.find(request.key)
        if grade is not None:
            show(grade)
    progress.begin()
    live = LiveGrading(grades, show)
    try:
        made = generate(plan, backend, samples, progress, live.put)
    except BaseException:
        live.stop()
        raise
    if was_stopped():
        live.stop()
        return made
    live.finish()
    progress.finish()
    return made


def graded_items(plan: Plan, samples: KeyedFile, grades: Grades) -> dict[str, ItemScores]:
    """Every sample of the plan that is there, with its grade, by item; what has no grade yet gets one."""
    keys = [request.key for request in plan.requests if request.key in samples]
    ungraded = [key for key in keys if grades.key(key) not in grades.file]
    for _ in grades.add(samples.read(key) for key in ungraded):
        pass
    found: dict[str, ItemScores] = {}
    for key in keys:
        row, grade = samples.read(key), grades.find(key)
        assert grade is not None
        found.setdefault(row["item"], ItemScores()).add(row, grade)
    return found
