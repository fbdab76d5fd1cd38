"""What a person sees while an evaluation goes on: done, running score with its error, speed, time left. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from psft.evaluation.statistics import mean_over_problems

_EVERY_TERMINAL_S, _EVERY_FILE_S = 0.5, 30.0


class Progress:
    """One line for one benchmark, drawn over itself in a terminal, a line every 30 s elsewhere.

    total, done: samples in all, and those that were there before. clock: seconds, rising.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.done = title, total, done
        self._stream = stream or sys.stderr
        self._clock = clock
        self._is_terminal = self._stream.isatty()
        self._start = self._last = clock()
        self._made = self._tokens = self._failed = 0
        self._scores: dict[str, list[float]] = {}

    def begin(self) -> None:
        """Say that it goes on: the first samples may take a while."""
        self._write()

    def scored(self, item: str, score: float) -> None:
        """Take in a grade."""
        self._scores.setdefault(item, []).append(score)

    def made(self, num_tokens: int | None) -> None:
        """Take in a sample that was just made."""
        self.done += 1
        self._made += 1
        self._tokens += num_tokens or 0

    def failed(self) -> None:
        """Take in a request without an answer."""
        self._failed += 1

    def show(self) -> None:
        """Draw the line if it is time; called when all that came together was taken in, else the rest seems long."""
        now = self._clock()
        if now - self._last >= (_EVERY_TERMINAL_S if self._is_terminal else _EVERY_FILE_S):
            self._last = now
            self._write()

    def finish(self) -> None:
        """Leave the last state on the screen."""
        start = "\r\x1b[K" if self._is_terminal else ""
        self._stream.write(f"{start}{self.line()}\n")
        self._stream.flush()

    def line(self) -> str:
        """`AIME24 37/960 · avg 12.5 ± 4.1 % · 142 tok/s · 3:20 left`"""
        parts = [f"{self.title} {self.done:,}/{self.total:,}"]
        scores = list(self._scores.values())  # one look: the grading thread adds to it
        if scores:
            found = mean_over_problems([sum(own) / len(own) for own in scores])
            error = f" ± {100 * found.stderr:.1f}" if found.stderr is not None else ""
            parts.append(f"avg {100 * found.value:.1f}{error} %")
        seconds = self._clock() - self._start
        if self._made and seconds > 0:
            if self._tokens:
                parts.append(f"{self._tokens / seconds:,.0f} tok/s")
            left = (self.total - self.done - self._failed) * seconds / self._made
            parts.append(f"{_duration(left)} left" if left > 0 else f"took {_duration(seconds)}")
        if self._failed:
            parts.append(f"{self._failed} without an answer")
        return " · ".join(parts)

    def _write(self) -> None:
        self._stream.write(f"\r\x1b[K{self.line()}" if self._is_terminal else f"{self.line()}\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
