"""The arithmetic of windows: which rows of an epoch form which optimizer step. Plain Python, no torch.

epoch (a permutation of the rows)
|-- window 0: train_batch_size rows -------------------|-- window 1 ------ ... --|-- rest: short window, or dropped
|-- step: mini_batch_size rows --|-- step --| ... K    |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from psft.errors import RequestError


@dataclass(frozen=True)
class Step:
    """One optimizer step: rows [start, stop) of the epoch's order.

    window: 0-based over the run. mini_batch: 1..num_mini_batches within the window. is_warmup: plain SFT before PSFT.
    """

    window: int
    mini_batch: int
    num_mini_batches: int
    start: int
    stop: int
    is_warmup: bool = False


@dataclass(frozen=True)
class EpochPlan:
    """What one epoch without warm-up consists of."""

    num_windows: int
    num_steps: int
    num_rows_used: int
    num_rows_dropped: int


def plan_epoch(num_rows: int, *, train_batch_size: int, mini_batch_size: int, drop_last: bool) -> EpochPlan:
    """Count windows and steps of one epoch of `num_rows` rows; `drop_last` leaves out an incomplete last window."""
    steps = list(Schedule(num_rows, train_batch_size, mini_batch_size, drop_last=drop_last).epoch(0))
    used = steps[-1].stop if steps else 0
    return EpochPlan(len({step.window for step in steps}), len(steps), used, num_rows - used)


@dataclass(frozen=True)
class Schedule:
    """Every optimizer step of a run, epoch by epoch.

    Warm-up steps come first, on the same step axis; each is a window of its own, since plain SFT has no old policy.

    Args:
        num_rows: rows of the training set.
        train_batch_size: rows of a window (all ranks).
        mini_batch_size: rows of an optimizer step (all ranks); divides train_batch_size.
        drop_last: leave out what does not fill a window (or a warm-up step) at the end of an epoch.
        warmup_steps, warmup_mini_batch_size: plain-SFT steps before PSFT and their rows.
    Raises:
        RequestError: a size below 1, mini-batches that do not divide the window, or an epoch without a single step.
    """

    num_rows: int
    train_batch_size: int
    mini_batch_size: int
    drop_last: bool = False
    warmup_steps: int = 0
    warmup_mini_batch_size: int | None = None

    def __post_init__(self) -> None:
        check_batch_sizes(self.train_batch_size, self.mini_batch_size)
        if self.num_rows < 1:
            raise RequestError("the training set has no rows. Give at least one demonstration.")
        if self.drop_last and self.num_rows < max(self.train_batch_size, self._warmup_rows):
            raise RequestError(
                f"dataloader_drop_last leaves nothing to train on: {self.num_rows} rows do not fill one window of "
                f"train_batch_size={self.train_batch_size}. Lower train_batch_size or set dataloader_drop_last=false."
            )

    @property
    def _warmup_rows(self) -> int:
        return (self.warmup_mini_batch_size or self.train_batch_size) if self.warmup_steps else 0

    def epochs(self) -> Iterator[list[Step]]:
        """The steps of epoch 0, 1, 2, ... without end."""
        num_steps = window = 0
        while True:
            steps: list[Step] = []
            row = 0
            while row < self.num_rows:
                is_warmup = num_steps + len(steps) < self.warmup_steps
                size = self._warmup_rows if is_warmup else self.train_batch_size
                if row + size > self.num_rows and self.drop_last:
                    break
                end = min(row + size, self.num_rows)
                mini = size if is_warmup else self.mini_batch_size
                starts = range(row, end, mini)
                steps += [
                    Step(window, k, len(starts), start, min(start + mini, end), is_warmup)
                    for k, start in enumerate(starts, start=1)
                ]
                window, row = window + 1, end
            num_steps += len(steps)
            yield steps

    def epoch(self, index: int) -> list[Step]:
        """The steps of one epoch, 0-based."""
        for number, steps in enumerate(self.epochs()):
            if number == index:
                return steps
        raise AssertionError("epochs() does not end")

    def num_steps(self, num_epochs: float) -> int:
        """Optimizer steps of `num_epochs` epochs; a fraction of an epoch is rounded up to whole steps."""
        total, left = 0, num_epochs
        for steps in self.epochs():
            if left <= 0:
                return total
            part = min(left, 1.0)
            total += -int(-len(steps) * part // 1)
            left -= part
        raise AssertionError("epochs() does not end")

    def num_epochs(self, num_steps: int) -> int:
        """Epochs, begun ones included, that `num_steps` optimizer steps take."""
        left = num_steps
        for number, steps in enumerate(self.epochs(), start=1):
            left -= len(steps)
            if left <= 0:
                return number
        raise AssertionError("epochs() does not end")

    @property
    def max_steps_per_epoch(self) -> int:
        """The most steps any epoch has: those without warm-up, or those of the first if warm-up steps are smaller."""
        plain = Schedule(self.num_rows, self.train_batch_size, self.mini_batch_size, self.drop_last)
        return max(len(self.epoch(0)), len(plain.epoch(0)))


def check_batch_sizes(train_batch_size: int, mini_batch_size: int) -> None:
    """Raise `RequestError` unless both are at least 1 and mini-batches divide the window exactly."""
    for name, value in (("train_batch_size", train_batch_size), ("mini_batch_size", mini_batch_size)):
        if value < 1:
            raise RequestError(f"{name}={value} must be at least 1.")
    if train_batch_size % mini_batch_size:
        divisors = [d for d in range(1, train_batch_size + 1) if train_batch_size % d == 0]
        near = min(divisors, key=lambda d: abs(d - mini_batch_size))
        window = mini_batch_size * max(1, round(train_batch_size / mini_batch_size))
        raise RequestError(
            f"mini_batch_size={mini_batch_size} does not divide train_batch_size={train_batch_size}: a window is cut "
            f"into equal mini-batches. Use mini_batch_size={near}, or train_batch_size={window}."
        )
