"""Rows of the training set, one mini-batch of this rank at a time, in the order a `Schedule` lays down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import seed_worker

from psft.data.microbatch import Cut, deal_and_cut
from psft.errors import RequestError
from psft.trainers.stop_signal import leave_signals_to_parent
from psft.window import Schedule, Step

Layout = list[list[int]]
"""Row numbers of each micro-batch of a mini-batch, of one rank."""


class WindowSampler(Sampler[Layout]):
    """Yield, for each optimizer step of an epoch, the row numbers of this rank's micro-batches.

    The order of an epoch is a permutation drawn from (seed, epoch) alone: the same on every rank and after a restart,
    whatever else consumes random numbers. The ranks share the rows of a mini-batch as `deal_and_cut` says, so together
    they hold the rows one process would.

    It runs in the main process, before workers read anything, so both passes of a window see one cut.

    Args:
        lengths: tokens of every row of the training set.
        cut: how mini-batches are cut from now on; may be replaced between epochs.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        lengths: Sequence[int],
        cut: Cut,
        seed: int,
        is_shuffled: bool,
        rank: int,
        world_size: int,
    ) -> None:
        self.schedule = schedule
        self.lengths = lengths
        self.cut = cut
        self.seed = seed
        self.is_shuffled = is_shuffled
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._kept: dict[tuple[int, int], Layout] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def keep(self, epoch: int, layouts: Mapping[int, Layout]) -> None:
        """Cut these steps of `epoch` (0-based) as an open window of a checkpoint was cut, whatever `cut` says now."""
        self._kept = {(epoch, step): [group for group in layout if group] for step, layout in layouts.items()}

    def __len__(self) -> int:
        return self.schedule.max_steps_per_epoch

    def steps(self) -> list[Step]:
        """The optimizer steps of the current epoch."""
        return self.schedule.epoch(self.epoch)

    def mini_batches(self) -> Iterator[list[int]]:
        """The rows of each optimizer step of the current epoch, of all ranks."""
        order = list(range(self.schedule.num_rows))
        if self.is_shuffled:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        for step in self.steps():
            yield order[step.start : step.stop]

    def __iter__(self) -> Iterator[Layout]:
        """Raises RequestError: a row over a hard cap, or a kept layout that holds other rows than the step."""
        for number, rows in enumerate(self.mini_batches()):
            kept = self._kept.get((self.epoch, number))
            if kept:
                _check_rows(kept, rows)
            yield kept or deal_and_cut(rows, self.lengths, self.cut, rank=self.rank, world_size=self.world_size)


def _check_rows(layout: Layout, rows: list[int]) -> None:
    if not {row for group in layout for row in group} <= set(rows):
        raise RequestError(
            "the rest of the open window cannot be drawn again as it was: its rows belong to other steps now. "
            "Go on from the next window on with --allow_changed batch_sizes."
        )


class WindowLoader(DataLoader[Any]):
    """A DataLoader over a `WindowSampler`; the Trainer tells it the epoch through `set_epoch`."""

    @property
    def window_sampler(self) -> WindowSampler:
        assert isinstance(self.batch_sampler, WindowSampler)
        return self.batch_sampler

    def set_epoch(self, epoch: int) -> None:
        self.window_sampler.set_epoch(epoch)


def window_loader(
    dataset: Any, sampler: WindowSampler, collate: Callable[[Any], dict[str, Any]], args: Any
) -> WindowLoader:
    """The loader of a trainer, its workers set up as `args` (transformers' TrainingArguments) say."""
    workers = args.dataloader_num_workers

    def start_worker(worker: int) -> None:
        leave_signals_to_parent()
        seed_worker(worker, workers, args.process_index)

    return WindowLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        worker_init_fn=start_worker if workers else None,
    )
