"""Masked arithmetic that the objectives share."""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Nats. Where nothing else bounds it, a log-ratio is held here before `exp`, as verl does: e^20 is 4.9e8, e^89 is
infinite in float32. Beyond it there is no gradient."""


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask`; anything elsewhere, nan included, changes neither the sum nor the gradient."""
    return torch.where(mask, values, 0.0).sum()
