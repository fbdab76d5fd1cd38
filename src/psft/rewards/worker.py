"""A process that grades rows for `psft.rewards.pool`, which starts an interpreter that calls `serve`.

A fresh interpreter instead of a fork: the parent may hold threads, a GPU, or a `__main__` without a guard. It has one
thread, the main one, and is told rows over a socket. Time is counted in processor seconds, so that a busy machine times
out the same rows as an idle one, by two timers of the kernel:

    SIGVTALRM  after the limit: raises `_TimeIsUp` between two steps of Python, which ends nearly every expression
    SIGPROF    a little later: its default action ends the process, also inside a product of two endless integers, and
               also when the parent is gone
"""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from psft.errors import RequestError, first_line, shown
from psft.rewards.base import TIMED_OUT, Grade, Grader
from psft.rewards.registry import get_grader

GRACE_S = 1.0
"""Processor seconds between the exception and the end of the process."""
MEMORY_LIMIT = 4 << 30
"""Bytes of address space of a worker: an expression that grows without end fails by itself, not the machine."""


class _TimeIsUp(BaseException):
    """The row's time is used up. Not an Exception, since libraries catch those to try another way."""


def main(connection: Connection) -> None:
    """Serve until the parent hangs up. Messages: in (name, settings, time limit), then (key, row)...; out ("ready",),
    then ("grade", key, Grade) or ("refused", key, message) for each, in order."""
    try:
        name, settings, time_limit = connection.recv()
        grader = _prepared(connection, name, settings)
        while grader is not None:
            key, row = connection.recv()
            try:
                grade = _grade_in_time(grader, row, time_limit)
            except RequestError as error:
                connection.send(("refused", key, str(error)))
            else:
                connection.send(("grade", key, grade))
    except (EOFError, ConnectionError):
        pass  # the parent has what it wanted, or is gone


def _prepared(connection: Connection, name: str, settings: dict[str, Any]) -> Grader | None:
    try:
        grader = get_grader(name, **settings)
        grader.prepare()
    except RequestError as error:
        connection.send(("refused", None, str(error)))
        return None
    connection.send(("ready",))
    return grader


def _grade_in_time(grader: Grader, row: Any, time_limit: float) -> Grade:
    try:
        with _limited(time_limit):
            return grader(row)
    except RequestError:
        raise
    except _TimeIsUp:
        return timed_out(time_limit)
    except MemoryError:
        return Grade(0.0, None, f"needed more than {MEMORY_LIMIT >> 30} GiB of memory", is_failure=True)
    except Exception as error:  # whatever sympy makes of an expression nobody has tried before
        said = f"could not be graded: {type(error).__name__}: {shown(first_line(error), 120)}"
        return Grade(0.0, None, said, is_failure=True)


def timed_out(time_limit: float) -> Grade:
    return Grade(0.0, None, f"{TIMED_OUT} after {time_limit:g} s", is_failure=True)


@contextlib.contextmanager
def _limited(time_limit: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, time_limit + GRACE_S)
    signal.setitimer(signal.ITIMER_VIRTUAL, time_limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _raise_time_is_up(signum: int, frame: Any) -> None:
    raise _TimeIsUp


def serve(descriptor: int) -> None:
    """All that this process does. descriptor: of its end of the socket."""
    signal.signal(signal.SIGVTALRM, _raise_time_is_up)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends the workers
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    main(Connection(descriptor))
