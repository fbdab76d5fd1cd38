"""Plain twins of the fused operations: a reader's definition and the tests' ground truth. Memory is no object here."""

import torch
from torch import Tensor

from psft.ops.token_statistics import TokenStatistics


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int = 0,
) -> TokenStatistics:
    """As `psft.ops.token_statistics`, by autograd through the full (N, V) logits; `chunk_rows` has no effect."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_softmax = torch.log_softmax(logits, -1)
    return TokenStatistics(
        logps=log_softmax.gather(1, labels[:, None])[:, 0],
        entropies=-(log_softmax.exp() * log_softmax).sum(-1),
        is_top1=logits.argmax(-1) == labels,
    )
