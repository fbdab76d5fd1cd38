"""Which sequence a token belongs to, and what a loss is divided by, for any layout of a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOSS_AGGREGATIONS = ("token_mean_global", "micro_batch_token_mean")


def sequence_ids(micro_batch: dict[str, Any]) -> Tensor:
    """(B, T - 1) int64, aligned with labels[:, 1:]: the number of each target token's sequence within the micro-batch.

    Padded rows are one sequence each. In a padding-free row `position_ids` start again at 0 with every sequence.
    """
    labels = micro_batch["labels"]
    positions = micro_batch.get("position_ids")
    if positions is None or "attention_mask" in micro_batch:
        return torch.arange(len(labels), device=labels.device)[:, None].expand(len(labels), labels.shape[1] - 1)
    starts = (positions == 0).flatten().cumsum(0).view(positions.shape) - 1
    return starts[:, 1:]


def aggregation_normalizer(aggregation: str, mask: Tensor, num_tokens: Tensor, share: float, world_size: int) -> Tensor:
    """What one micro-batch's sum over tokens is divided by.

    token_mean_global: `num_tokens`, all tokens of the optimizer step, so the result does not depend on the cut.
    micro_batch_token_mean: the mean over the micro-batch's own tokens, times its share of the rank's rows, averaged
        over ranks: what verl 0.5 computes (`agg_loss` with its `loss_scale_factor`), and with it the authors' runs.

    Args:
        mask: (B, T) bool, the micro-batch's trained tokens.
        num_tokens: scalar, trained tokens of the step over all ranks.
        share: the micro-batch's rows over those of this rank's part of the step.
    """
    if aggregation == "token_mean_global" or share == 0:  # an empty micro-batch has nothing to average
        return num_tokens
    return mask.sum().clamp(min=1) * world_size / share
