"""From the rows of a mini-batch to micro-batches: dealt to the ranks, cut under a hard cap, collated.

The cut decides speed and memory, never the result: every objective divides by the tokens of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psft.errors import RequestError

ROW_NUMBER, ROW_NUMBERS = "row_number", "row_numbers"

CPU_OVERHEAD_TOKENS = 32
"""What a micro-batch costs beside its tokens, in tokens. SmolLM2-135M, bfloat16, one thread, GSM8K, mini-batch 8 under
1024 tokens: a step takes 0.964 of one whose micro-batches are filled up to the cap; with 64 it is 0.974, with 128 0.976
(CPU time, medians of six interleaved)."""
ACCELERATOR_OVERHEAD_TOKENS = 1024
"""The same where a micro-batch also costs kernel launches, casts of all weights, or their gathering from other ranks.
Reckoned, not measured: 7 ms of launches at 150,000 tokens a second."""


@dataclass(frozen=True)
class Cut:
    """How a mini-batch is cut.

    max_tokens: cap of one micro-batch on one device, in padded tokens. is_hard: a row over it is an error; else it gets
    a micro-batch to itself. is_padded: rows are padded to the longest; False where they are joined into one row.
    overhead_tokens: what a micro-batch costs beside its tokens, in tokens.
    """

    max_tokens: int
    is_hard: bool = True
    is_padded: bool = True
    overhead_tokens: int = CPU_OVERHEAD_TOKENS


def cut_by_tokens(lengths: Sequence[int], cut: Cut) -> list[list[int]]:
    """Group row numbers so that no group exceeds the cap, longest rows first, at the least cost.

    A padded group costs rows x longest row + the overhead. Rows sorted by length are cut where the sum over groups is
    least, by dynamic programming: n log n for the sorting, then one pass over the sizes each row could end.

    Args:
        lengths: tokens of each row.
    Returns:
        groups of indices into `lengths`; every row once; ties keep their order, so the cut is deterministic.
    Raises:
        RequestError: a row is longer than a hard cap.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes = np.array([lengths[i] for i in order], dtype=np.int64)
    cap = cut.max_tokens
    if sizes[0] > cap and cut.is_hard:
        raise RequestError(
            f"max_tokens_per_micro_batch={cap} is a hard cap, but a training sequence has {sizes[0]} tokens. "
            f"Raise it to at least {sizes[0]}, or lower max_length."
        )
    cap = max(cap, int(sizes[0]))
    before = np.concatenate([[0], np.cumsum(sizes)])
    best = np.zeros(len(sizes) + 1, dtype=np.int64)  # least cost of the first n rows
    cut_at = np.zeros(len(sizes) + 1, dtype=np.int64)  # where their last group begins
    first = 0
    for stop in range(1, len(sizes) + 1):
        starts = np.arange(first, stop)
        tokens = (stop - starts) * sizes[first:stop] if cut.is_padded else before[stop] - before[first:stop]
        fits = int(np.argmax(tokens <= cap))  # tokens fall from left to right
        costs = best[first + fits : stop] + tokens[fits:] + cut.overhead_tokens
        first += fits
        cut_at[stop] = first + int(np.argmin(costs))
        best[stop] = costs.min()
    groups: list[list[int]] = []
    stop = len(sizes)
    while stop:
        start = int(cut_at[stop])
        groups.append(order[start:stop])
        stop = start
    return groups[::-1]


def deal_and_cut(
    rows: Sequence[int], lengths: Sequence[int], cut: Cut, *, rank: int, world_size: int
) -> list[list[int]]:
    """The micro-batches of one rank's share of a mini-batch, as row numbers.

    Sorted by length, every next `world_size` rows go to the ranks, one each, to and fro: the ranks' shares are alike in
    number and length. The cut is made once for all ranks, from the longest row of each such deal, so that micro-batch i
    is of like size on all of them: an optimizer step waits for the slowest rank, a sharded model at every micro-batch.

    Args:
        rows: row numbers of the mini-batch, the same on every rank.
        lengths: tokens of every row of the data set, by row number.
    Returns:
        groups of row numbers. A rank that gets no row (a last mini-batch smaller than the ranks) gets [[~row]]: it
        borrows one to stay in step with the others, and trains nothing.
    Raises:
        RequestError: a row is longer than a hard cap.
    """
    order = sorted(rows, key=lambda row: -lengths[row])
    deals = [order[i : i + world_size] for i in range(0, len(order), world_size)]
    groups = cut_by_tokens([lengths[deal[0]] for deal in deals], cut)
    mine = [deal[rank:][:1] if turn % 2 == 0 else deal[world_size - 1 - rank :][:1] for turn, deal in enumerate(deals)]
    own = [[row for turn in group for row in mine[turn]] for group in groups]
    return [group for group in own if group] or [[~order[-1]]]


class NumberedRows:
    """A map-style data set read a mini-batch at a time; its rows carry their own number under "row_number"."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, micro_batches: list[list[int]]) -> list[list[dict[str, Any]]]:
        """The rows of each micro-batch; ~number for a borrowed row."""
        wanted = [max(number, ~number) for group in micro_batches for number in group]
        if hasattr(self.dataset, "__getitems__"):
            rows = iter(self.dataset.__getitems__(wanted))  # one read for a whole mini-batch
        else:
            rows = iter([self.dataset[number] for number in wanted])
        return [[{**next(rows), ROW_NUMBER: number} for number in group] for group in micro_batches]


class MiniBatchCollator:
    """Collate the rows of each micro-batch of a mini-batch.

    Args:
        collate: makes padded (or padding-free) model inputs from a list of rows, as TRL's collators do.
    Returns, when called with `NumberedRows.__getitems__`'s lists:
        {"micro_batches": [inputs, ...], "num_rows": rows, "num_input_tokens": their tokens without padding}
        Rows that carry their number in the data set ("row_number") leave it in inputs["row_numbers"], a list.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, groups: list[list[dict[str, Any]]]) -> dict[str, Any]:
        own = [row for group in groups for row in group if row[ROW_NUMBER] >= 0]
        return {
            "micro_batches": [self._micro_batch(group) for group in groups],
            "num_rows": len(own),
            "num_input_tokens": sum(len(row["input_ids"]) for row in own),
        }

    def _micro_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = [row[ROW_NUMBER] for row in rows]
        inputs = self.collate([{name: value for name, value in row.items() if name != ROW_NUMBER} for row in rows])
        return {**inputs, ROW_NUMBERS: numbers} if min(numbers) >= 0 else empty_micro_batch(inputs)


def empty_micro_batch(like: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch that trains nothing, for a rank that has fewer than the others: one row of `like`, unlabelled.

    A padding-free row cannot be cut without its neighbours' positions, so it stays whole.
    """
    is_padded = "attention_mask" in like
    rows = {
        name: value[:1] if is_padded and hasattr(value, "shape") else value
        for name, value in like.items()
        if name != ROW_NUMBERS
    }
    return {**rows, "labels": rows["labels"].new_full(rows["labels"].shape, -100), ROW_NUMBERS: []}
