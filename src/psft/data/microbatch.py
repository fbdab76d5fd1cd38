"""Cut a mini-batch into micro-batches: sorted by length, under a hard cap of padded tokens.

The cut decides speed and memory, never the result: every objective divides by the tokens of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psft.errors import RequestError

ROW_NUMBER, ROW_NUMBERS = "row_number", "row_numbers"


class NumberedRows:
    """A map-style data set whose rows carry their own number under "row_number"."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.dataset[number], ROW_NUMBER: number}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        if not hasattr(self.dataset, "__getitems__"):
            return [self[number] for number in numbers]
        rows = self.dataset.__getitems__(numbers)  # one read for a whole mini-batch
        return [{**row, ROW_NUMBER: number} for row, number in zip(rows, numbers, strict=True)]


def cut_by_tokens(lengths: Sequence[int], max_tokens: int, *, is_padded: bool = True) -> list[list[int]]:
    """Group row numbers so that no group exceeds `max_tokens`, longest rows first.

    Args:
        lengths: tokens of each row.
        max_tokens: hard cap on a group's size: rows x longest row if `is_padded`, else the sum of its rows.
    Returns:
        groups of indices into `lengths`; every row once; ties keep their order, so the cut is deterministic.
    Raises:
        RequestError: a single row is longer than the cap.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if order and lengths[order[0]] > max_tokens:
        raise RequestError(
            f"max_tokens_per_micro_batch={max_tokens} is a hard cap, but a training sequence has "
            f"{lengths[order[0]]} tokens. "
            f"Raise it to at least {lengths[order[0]]}, or lower max_length."
        )
    groups: list[list[int]] = []
    size = 0
    for i in order:
        # Longest first: a group's padded width is that of its first row.
        grown = (len(groups[-1]) + 1) * lengths[groups[-1][0]] if groups and is_padded else size + lengths[i]
        if not groups or grown > max_tokens:
            groups.append([i])
            size = lengths[i]
        else:
            groups[-1].append(i)
            size = grown
    return groups


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


class MiniBatchCollator:
    """Collate rows of one mini-batch into a list of micro-batches.

    Args:
        collate: makes padded (or padding-free) model inputs from a list of rows, as TRL's collators do.
        max_tokens: hard cap of one micro-batch, or "auto": `auto_tokens`, or the longest row if that is longer.
        auto_tokens: the cap that "auto" starts from.
        is_padded: rows are padded to the longest; False when `collate` joins them into one row.
    Returns, when called:
        {"micro_batches": [inputs, ...], "num_rows": rows, "num_input_tokens": their tokens without padding}
        Rows that carry their number in the data set ("row_number") leave it in inputs["row_numbers"], a list.
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        *,
        max_tokens: int | str,
        auto_tokens: int,
        is_padded: bool = True,
    ) -> None:
        self.collate = collate
        self.max_tokens = max_tokens
        self.auto_tokens = auto_tokens
        self.is_padded = is_padded

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(row["input_ids"]) for row in rows]
        cap = max([self.auto_tokens, *lengths]) if self.max_tokens == "auto" else int(self.max_tokens)
        groups = cut_by_tokens(lengths, cap, is_padded=self.is_padded)
        micro_batches = []
        for group in groups:
            members = [dict(rows[i]) for i in group]
            numbers = [member.pop(ROW_NUMBER) for member in members if ROW_NUMBER in member]
            micro_batches.append({**self.collate(members), **({ROW_NUMBERS: numbers} if numbers else {})})
        return {
            "micro_batches": micro_batches,
            "num_rows": len(rows),
            "num_input_tokens": sum(lengths),
        }
