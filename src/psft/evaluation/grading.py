"""Grades samples, as they come or later again, and keeps the grades: grades.jsonl beside samples.jsonl.

A grade's key holds the sample's key and what graded it (grader, settings, versions), so grading anew under other
settings never mixes with what is there, and nothing is graded twice.
"""

from __future__ import annotations

import importlib.metadata
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import psft
from psft.evaluation.items import Data
from psft.evaluation.samples import KeyedFile, digest
from psft.rewards import Grade, get_grader, grade_rows

_PACKAGES: dict[str, tuple[str, ...]] = {
    "math": ("math-verify", "latex2sympy2-extended", "sympy"),
    "ifeval": ("lm-eval", "langdetect", "nltk"),
    "reasoning_gym": ("reasoning-gym",),
}
"""Kind -> distributions whose version may change a grade."""
_WAIT_S = 0.2
"""How long the live grader waits for one more sample before it grades those it has."""
_LONGEST_STOP_S = 10.0
"""How long a stopped evaluation waits for a row that is just being graded."""


class GradeRow(TypedDict, total=False):
    """What a grader said of one sample, a line of grades.jsonl."""

    key: str
    sample: str
    """The sample's key."""
    benchmark: str
    item: str
    index: int
    score: float
    extracted: str | None
    """The answer found in the response; null = none."""
    reason: str
    details: dict[str, Any]


def grader_of(data: Data) -> dict[str, Any]:
    """What grades a benchmark: name, settings, versions."""
    versions: dict[str, str | None] = {"psft": psft.__version__}
    for name in _PACKAGES.get(data.benchmark.kind, ()):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"name": data.benchmark.kind, "settings": dict(data.benchmark.grader), "versions": versions}


def prepare_graders(data: Iterable[Data]) -> None:
    """Find out before anything is generated whether all of it can be graded.

    Raises:
        RequestError: an unknown setting, or a package or file is missing.
    """
    for part in data:
        get_grader(part.benchmark.kind, **_settings(part)).prepare()


def _settings(data: Data) -> dict[str, Any]:
    """The grader's settings, and for IFEval nltk's sentence model where it lies beside the data. A place is no setting
    of its own: it is in no key."""
    beside = Path(data.source).parent / "nltk_data"
    found: dict[str, Any] = {"nltk_data": str(beside)} if data.benchmark.kind == "ifeval" and beside.is_dir() else {}
    return {**found, **data.benchmark.grader}


class Grades:
    """The grades of one benchmark's samples in a `KeyedFile`."""

    def __init__(self, data: Data, file: KeyedFile) -> None:
        self.data = data
        self.file = file
        self.grader = grader_of(data)
        self._grading = {item.id: item.grading for item in data.items}

    def key(self, sample_key: str) -> str:
        return digest([sample_key, self.grader])[:32]

    def find(self, sample_key: str) -> GradeRow | None:
        """The grade of a sample, if there is one."""
        key = self.key(sample_key)
        return GradeRow(**self.file.read(key)) if key in self.file else None  # type: ignore[typeddict-item]

    def add(self, samples: Iterable[Mapping[str, Any] | None]) -> Iterator[GradeRow]:
        """Grade samples in order and keep each grade before it is yielded. None: the next sample is yet to come."""
        waiting: deque[Mapping[str, Any]] = deque()

        def rows() -> Iterator[dict[str, Any] | None]:
            for sample in samples:
                if sample is None:
                    yield None
                    continue
                waiting.append(sample)
                yield {**self._grading[sample["item"]], "response": sample["response"]}

        for grade in grade_rows(self.data.benchmark.kind, rows(), **_settings(self.data)):
            row = self._row(waiting.popleft(), grade)
            self.file.append([row])
            yield row

    def _row(self, sample: Mapping[str, Any], grade: Grade) -> GradeRow:
        return GradeRow(
            key=self.key(sample["key"]),
            sample=sample["key"],
            benchmark=sample["benchmark"],
            item=sample["item"],
            index=sample["index"],
            score=float(grade.score),
            extracted=grade.extracted,
            reason=grade.reason,
            details=dict(grade.details),
        )


class LiveGrading:
    """Grades what `put` is given, in a thread, while others generate; for the running score, and to have it done.

        live = LiveGrading(grades, on_grade)
        live.put(sample)
        live.finish()     # waits until all is graded, and raises what went wrong in the thread
        live.stop()       # or: ends it as soon as it can; what it did not come to is graded later from the samples

    The thread alone uses the file of grades until one of the two is back.
    """

    def __init__(self, grades: Grades, on_grade: Callable[[GradeRow], None]) -> None:
        self._queue: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._is_stopped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(grades, on_grade), daemon=True)
        self._thread.start()

    def put(self, sample: Mapping[str, Any]) -> None:
        self._queue.put(sample)

    def finish(self) -> None:
        """Wait until all is graded."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Wait for the row in hand at most; its processes end, too."""
        self._is_stopped.set()
        self._queue.put(None)
        self._thread.join(_LONGEST_STOP_S)

    def _work(self, grades: Grades, on_grade: Callable[[GradeRow], None]) -> None:
        try:
            for row in grades.add(self._samples()):
                on_grade(row)
        except BaseException as error:
            self._error = error

    def _samples(self) -> Iterator[Mapping[str, Any] | None]:
        """What was put, None whenever there is nothing for a moment."""
        while not self._is_stopped.is_set():
            try:
                sample = self._queue.get(timeout=_WAIT_S)
            except queue.Empty:
                yield None
                continue
            if sample is None:
                return
            yield sample
        raise _Stopped


class _Stopped(Exception):
    """Ends the thread and its worker processes, whatever they have in hand."""
