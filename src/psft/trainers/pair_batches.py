"""Pairs on their way through an optimizer step: collated by micro-batch, and what their losses told, summed up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from psft.data.microbatch import ROW_NUMBER, ROW_NUMBERS

OF_PAIRS = {
    "rewards/chosen": "rewards_chosen",
    "rewards/rejected": "rewards_rejected",
    "rewards/margins": "rewards_margin",
    "rewards/accuracies": "rewards_accuracy",
    "logps/chosen": "logps_chosen",
    "logps/rejected": "logps_rejected",
}
"""What TRL logs as a mean over pairs, and its name in metrics.jsonl."""
OF_TOKENS = {"entropy": "entropy", "mean_token_accuracy": "mean_token_accuracy"}
"""Means over tokens: of both answers, and of the chosen one."""


class PairCollator:
    """Collate the pairs of each micro-batch of an optimizer step.

    Args:
        collate: TRL's collator: (2 x pairs, T) tensors, the chosen sequences first.
    Returns, when called with `NumberedRows.__getitems__`'s lists:
        {"micro_batches": [inputs, ...]}; each with the pairs' numbers in
        inputs["row_numbers"], none for a borrowed pair.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, groups: list[list[dict[str, Any]]]) -> dict[str, Any]:
        return {"micro_batches": [self._micro_batch(group) for group in groups]}

    def _micro_batch(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = [pair[ROW_NUMBER] for pair in pairs]
        return {**self.collate(pairs), ROW_NUMBERS: numbers if min(numbers) >= 0 else []}


class StepSums:
    """Sums over the micro-batches of a step, from which `read` makes exact means over all its pairs, or tokens."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(
            ("pairs", "tokens", "chosen_tokens", "input_tokens", "loss", *OF_PAIRS.values(), *OF_TOKENS.values()), 0.0
        )

    def add(self, micro_batch: Mapping[str, Any], measured: Mapping[str, float]) -> None:
        """Take in one micro-batch.

        Args:
            measured: its loss and TRL's metrics, means over its pairs or tokens. One without pairs adds nothing.
        """
        pairs = len(micro_batch[ROW_NUMBERS])
        if not pairs:
            return
        mask = micro_batch["completion_mask"][:, 1:]
        tokens, chosen = int(mask.sum()), int(mask[:pairs].sum())
        sums = self._sums
        sums["pairs"] += pairs
        sums["tokens"] += tokens
        sums["chosen_tokens"] += chosen
        sums["input_tokens"] += int(micro_batch["attention_mask"].sum())
        for theirs, ours in OF_PAIRS.items():
            sums[ours] += pairs * measured[theirs]
        sums["loss"] += pairs * measured["loss"]
        sums["entropy"] += tokens * measured["entropy"]
        sums["mean_token_accuracy"] += chosen * measured["mean_token_accuracy"]

    def read(self, reduce: Callable[[Tensor, str], Tensor], device: torch.device) -> dict[str, Any]:
        """Means over all ranks by their names in metrics.jsonl, and counts.

        Args:
            reduce: (tensor, "sum") -> its sum over all ranks.
        """
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.tensor(list(self._sums.values()), dtype=dtype, device=device)
        found = dict(zip(self._sums, reduce(sums, "sum").tolist(), strict=True))
        divisors = dict.fromkeys(("loss", *OF_PAIRS.values()), found["pairs"])
        divisors |= {"entropy": found["tokens"], "mean_token_accuracy": found["chosen_tokens"]}
        counts = {name: int(found[name]) for name in ("pairs", "tokens", "input_tokens")}
        return {**counts, **{name: found[name] / max(divisor, 1.0) for name, divisor in divisors.items()}}


@contextlib.contextmanager
def ungathered(accelerator: Any) -> Iterator[None]:
    """Let TRL's loss measure this rank's micro-batch alone. It gathers every metric of every micro-batch from all
    ranks, which needs equally many pairs on each; here sums are reduced once a step instead."""
    for name in ("gather", "gather_for_metrics"):
        setattr(accelerator, name, lambda value, *_, **__: value)
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
