"""Rows of the training set, one mini-batch of this rank at a time, in the order a `Schedule` lays down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from psft.window import Schedule, Step


class WindowSampler(Sampler[list[int]]):
    """Yield, for each optimizer step of an epoch, the row numbers of this rank.

    The order of an epoch is a permutation drawn from (seed, epoch) alone: the same on every rank and after a restart,
    whatever else consumes random numbers. Ranks take every world_size-th row of a mini-batch, so together they hold
    the rows one process would.
    """

    def __init__(self, schedule: Schedule, *, seed: int, is_shuffled: bool, rank: int, world_size: int) -> None:
        self.schedule = schedule
        self.seed = seed
        self.is_shuffled = is_shuffled
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.schedule.max_steps_per_epoch

    def steps(self) -> list[Step]:
        """The optimizer steps of the current epoch."""
        return self.schedule.epoch(self.epoch)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.schedule.num_rows))
        if self.is_shuffled:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        for step in self.steps():
            yield order[step.start : step.stop][self.rank :: self.world_size]


class WindowLoader(DataLoader[Any]):
    """A DataLoader over a `WindowSampler`; the Trainer tells it the epoch through `set_epoch`."""

    @property
    def window_sampler(self) -> WindowSampler:
        assert isinstance(self.batch_sampler, WindowSampler)
        return self.batch_sampler

    def set_epoch(self, epoch: int) -> None:
        self.window_sampler.set_epoch(epoch)
