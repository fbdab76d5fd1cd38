"""Functions for worker processes, which import them by this module's name."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from psft.data import templates
from psft.errors import RequestError


class OddError(Exception):
    """One that no other process can make again from its text."""

    def __init__(self, what: str, *, number: int) -> None:
        super().__init__(f"{what} {number}")


def square_and_process(item: int) -> tuple[int, int]:
    time.sleep(0.05 if item % 3 == 0 else 0.0)
    return item * item, os.getpid()


def refuse_four_and_six(item: int) -> int:
    if item in (4, 6):
        time.sleep(0.2 if item == 4 else 0.0)
        raise RequestError(f"row {item}")
    return item


def raise_odd_error(item: int) -> int:
    raise OddError("item", number=item)


def called_or_itself(item: Any) -> Any:
    return item() if callable(item) else item


def die_over_three(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def run_a_template_that_never_ends(limit_s: float) -> None:
    templates.CPU_LIMIT_S = limit_s
    with templates.within_limits():
        while True:
            pass


class Modules:
    """Of a process that has taken `carried` up: the names of what it has imported."""

    def __init__(self, carried: Any) -> None:
        self.carried = carried

    def __call__(self, item: Any) -> set[str]:
        return set(sys.modules)
