"""What "seconds" means in a benchmark: wall time, CPU time of the measuring thread, or time on a CUDA stream."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """`mark()` now and again later; `seconds(first, second)` afterwards, so that a CUDA clock need not wait between."""

    name: str

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class WallClock:
    """Time as people feel it. For a machine that does nothing else."""

    name = "wall"

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class ThreadCpuClock:
    """CPU time of this thread, for a machine that others use too. Work must stay in this thread: torch gets one.

    Waiting costs nothing on this clock, so it is blind to a data loader with workers and to disks.
    """

    name = "thread_cpu"

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def mark(self) -> float:
        return time.thread_time()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Time between two events on the current CUDA stream; the gaps in which it waited for the host are in it."""

    name = "cuda_events"

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


CLOCKS: dict[str, type[Any]] = {"wall": WallClock, "cpu": ThreadCpuClock, "cuda": CudaClock}


def make_clock(name: str) -> Clock:
    """By the names of `--clock`: wall, cpu (CPU time of one thread), cuda."""
    return CLOCKS[name]()
