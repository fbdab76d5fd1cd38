"""Grade many rows, in order, in worker processes that a hanging expression cannot hold up.

Each worker is told a few rows ahead. A row that uses up its time is given up by the worker itself (`worker`); a worker
that dies over a row, or says nothing for far longer than the limit, is replaced: that row gets score 0 and a reason,
the rows after it go to another worker. Nothing is retried, and nothing is lost.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from psft.errors import RequestError, RunFailed, shown
from psft.machine import logical_cores
from psft.processes import start_interpreter
from psft.rewards.base import Grade
from psft.rewards.registry import get_grader
from psft.rewards.worker import timed_out

Row = Mapping[str, Any]

AHEAD_BYTES = 64_000
"""How far a worker is told rows ahead, so that it never waits for the parent. Less than a socket holds: a parent that
had to wait for room would hear nobody."""
ROWS_PER_WORKER = 16
"""Fewer rows are not worth a process more, which takes a second or more to start."""
PENDING = 20_000
"""Rows read beyond the first one that has no grade yet: what is kept in memory while one row takes long."""
SILENCE_S = 60.0
"""Seconds a worker may be silent beyond ten times the limit (which counts processor time) before it is ended."""
START_S = 300.0
"""Seconds a worker may take to start: imports from a cold disk."""


def grade_rows(
    grader_name: str,
    rows: Iterable[Row | None],
    *,
    num_workers: int | None = None,
    time_limit: float = 5.0,
    **settings: Any,
) -> Iterator[Grade]:
    """Yield the grade of every row, in order.

    Args:
        grader_name, settings: as `get_grader` takes them.
        rows: read as they are needed, never all at once. None among them is no row; it says that the next one is yet
            to come, so that those before it are graded meanwhile. A source that never says so holds them up until
            every worker has its `ROWS_PER_WORKER`.
        num_workers: processes; default: one a processor this process may use. A quick grader needs none.
        time_limit: processor seconds a row may take. Beyond, its score is 0 and its reason begins "timed out".
    Raises:
        RequestError: the grader, a setting or a row cannot be used, or a package is missing.
        RunFailed: workers cannot be started.
    """
    grader = get_grader(grader_name, **settings)
    if num_workers is not None and num_workers < 1:
        raise RequestError(f"num_workers is {num_workers}; give 1 or more.")
    if not time_limit > 0:
        raise RequestError(f"time_limit is {time_limit:g} s; give a time above 0.")
    if grader.is_quick:
        grader.prepare()
        return (grader(row) for row in rows if row is not None)
    count = num_workers or logical_cores()
    return _Pool(count, (grader_name, settings, time_limit)).grade(rows)


class GradingPool:
    """`grade_rows` for a caller that comes again and again: the workers stay, so that only the first call pays for
    their start. `close` ends them; so does the end of this process.

    Args:
        as `grade_rows` takes them. Nothing is started before the first rows come.
    """

    def __init__(
        self, grader_name: str, *, num_workers: int | None = None, time_limit: float = 5.0, **settings: Any
    ) -> None:
        self.grader = get_grader(grader_name, **settings)
        self._pool: _Pool | None = None
        if not self.grader.is_quick:
            count = num_workers or logical_cores()
            self._pool = _Pool(count, (grader_name, settings, time_limit))

    def grade(self, rows: Iterable[Row]) -> list[Grade]:
        """The grade of every row, in order.

        Raises:
            RequestError: a row cannot be used. RunFailed: workers cannot be started.
        """
        if self._pool is None:
            return [self.grader(row) for row in rows]
        return list(self._pool.grade(rows, keeps_workers=True))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.end()


class _Worker:
    """A process, the rows it has been told, first in first out, and when it must have said something again."""

    def __init__(self, order: tuple[str, dict[str, Any], float]) -> None:
        self.told: deque[_Job] = deque()
        self.is_ready = False
        self.silence_s = SILENCE_S + 10 * order[2]
        self.process, self.connection = start_interpreter("psft.rewards.worker")
        self.deadline = time.monotonic() + START_S
        self.connection.send(order)

    @property
    def has_room(self) -> bool:
        return self.is_ready and sum(len(job.message) for job in self.told) < AHEAD_BYTES

    @property
    def is_busy(self) -> bool:
        return bool(self.told) or not self.is_ready

    def tell(self, job: _Job) -> None:
        """Raises OSError if the process is gone; the row counts as told."""
        if not self.told:
            self.deadline = time.monotonic() + self.silence_s
        self.told.append(job)
        self.connection.send_bytes(job.message)

    def hear(self) -> tuple[Any, ...]:
        """Raises EOFError or OSError if the process is gone, in the middle of a word even."""
        message: tuple[Any, ...] = self.connection.recv()
        self.deadline = time.monotonic() + self.silence_s
        if message[0] == "ready":
            self.is_ready = True
        elif self.is_ready:
            self.told.popleft()
        return message

    def end(self) -> int:
        """End the process, if it has not ended; its exit code, negative for a signal."""
        self.connection.close()
        self.process.kill()
        return self.process.wait()


@dataclass(frozen=True)
class _Job:
    """A row on its way: its number, and (number, row) as it is sent."""

    number: int
    message: bytes


class _Pool:
    """Workers, the rows still to be told, and grades that wait for those before them."""

    def __init__(self, num_workers: int, order: tuple[str, dict[str, Any], float]) -> None:
        self.num_workers = num_workers
        self.order = order
        self.workers: list[_Worker] = []
        self.grades: dict[int, Grade] = {}
        self.jobs: deque[_Job] = deque()

    def grade(self, rows: Iterable[Row | None], *, keeps_workers: bool = False) -> Iterator[Grade]:
        """Yield the grades. keeps_workers: once all are given the workers wait for the next call; else they are ended,
        as they are whenever this ends early."""
        source = iter(rows)
        is_read = is_whole = False
        num_read = num_given = 0
        try:
            while True:
                while not is_read and len(self.jobs) < self.num_workers * ROWS_PER_WORKER:
                    if num_read == num_given + PENDING:
                        break
                    try:
                        row = next(source)
                    except StopIteration:
                        is_read = True
                        break
                    if row is None:
                        break
                    self.jobs.append(_Job(num_read, pickle.dumps((num_read, row))))
                    num_read += 1
                self._start()
                self._tell()
                if any(worker.is_busy for worker in self.workers):
                    self._hear()
                while num_given in self.grades:
                    yield self.grades.pop(num_given)
                    num_given += 1
                if is_read and num_given == num_read:
                    is_whole = True
                    return
        finally:
            if not (is_whole and keeps_workers):
                self.end()

    def end(self) -> None:
        """End the workers; a later call starts others."""
        for worker in self.workers:
            worker.end()
        self.workers, self.grades, self.jobs = [], {}, deque()

    def _start(self) -> None:
        num_wanted = min(self.num_workers, -(-len(self.jobs) // ROWS_PER_WORKER))
        while len(self.workers) < num_wanted:
            self.workers.append(_Worker(self.order))

    def _tell(self) -> None:
        """Give the rows at hand to the workers, one by one to the one with the least to do."""
        while self.jobs:
            worker = min((w for w in self.workers if w.has_room), key=lambda w: len(w.told), default=None)
            if worker is None:
                return
            try:
                worker.tell(self.jobs.popleft())
            except OSError:
                self._bury(worker)

    def _hear(self) -> None:
        """Wait for a word from the workers, take it, and end those that have been silent for too long."""
        busy: dict[Any, _Worker] = {worker.connection: worker for worker in self.workers if worker.is_busy}
        rest_s = min(worker.deadline for worker in busy.values()) - time.monotonic()
        for connection in wait(list(busy), timeout=max(rest_s, 0.0)):
            worker = busy[connection]
            try:
                self._note(worker.hear())
                while worker.told and worker.connection.poll():
                    self._note(worker.hear())
            except (EOFError, OSError):
                self._bury(worker)
        now = time.monotonic()
        for worker in [worker for worker in self.workers if worker.is_busy and worker.deadline <= now]:
            self._bury(worker, is_silent=True)

    def _note(self, message: tuple[Any, ...]) -> None:
        if message[0] == "refused":
            raise RequestError(message[2])
        if message[0] == "grade":
            self.grades[message[1]] = message[2]

    def _bury(self, worker: _Worker, *, is_silent: bool = False) -> None:
        """Write down why the row it died over has no grade, and give its other rows to whoever is free."""
        self.workers.remove(worker)
        if not is_silent:
            with contextlib.suppress(EOFError, OSError):  # it may have said much before it died
                while worker.told:
                    self._note(worker.hear())
            worker.process.wait()  # its end of the socket is closed: it is ending
        code = worker.end()
        if not worker.is_ready:
            how = f"did not start within {START_S:g} s" if is_silent else f"ended with code {code} as it started"
            raise RunFailed(f"a worker of grader '{self.order[0]}' {how}. See its message above, if there is one.")
        if worker.told:
            lost = worker.told.popleft()
            self.grades[lost.number] = _grade_of_the_dead(code, is_silent, self.order[2])
        self.jobs.extendleft(reversed(worker.told))


def _grade_of_the_dead(code: int, is_silent: bool, time_limit: float) -> Grade:
    if is_silent or code == -signal.SIGPROF:
        return timed_out(time_limit)
    how = signal.Signals(-code).name if -code in set(signal.Signals) else f"code {code}"
    return Grade(0.0, None, f"its worker process died over it ({shown(how)})", is_failure=True)
