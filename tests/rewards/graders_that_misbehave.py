"""A grader of a user's own that does what a worker must survive; `response` says what."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from psft.rewards import Grade


class Misbehaving:
    """Misbehaves as the row's `response` says; extracts the number of its process."""

    name = "misbehaving"
    is_quick = False

    def __init__(self, at_start: str = "fine") -> None:
        self.at_start = at_start

    def prepare(self) -> None:
        _misbehave(self.at_start)

    def check(self, row: Mapping[str, Any]) -> None:
        """Takes any row."""

    def __call__(self, row: Mapping[str, Any]) -> Grade:
        _misbehave(row["response"])
        return Grade(1.0, str(os.getpid()), "fine")


def _misbehave(how: str) -> None:
    if how == "loop":  # in Python: an exception ends it
        while True:
            pass
    elif how == "endless product":  # in C: no exception comes through
        sys.set_int_max_str_digits(0)
        str(7**30_000_000)
    elif how == "sleep":  # uses no processor time
        time.sleep(3600)
    elif how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "leave":
        os._exit(3)
    elif how == "fail":
        raise ArithmeticError("no such number")
    elif how == "eat":
        bytearray(64 << 30)
