"""LM heads that give the mean negative log-probability of the scored positions, and its gradients.

All take the same call: hidden (P, H) of every position, weight (V, H), labels (P,) with IGNORE_INDEX where a position
is not scored. Compacting to scored rows is part of what is timed, for those that do it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from psft.objectives import ObjectiveOutput, psft_loss, sft_loss
from psft.ops import IGNORE_INDEX, TokenStatistics, token_loss, token_statistics

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, labels) -> loss, scalar, differentiable."""


@dataclass(frozen=True)
class Peer:
    """why_not: says why it cannot run on a device ("cpu", "cuda"), or None. grows: memory grows with the rows."""

    name: str
    head: Head
    why_not: Callable[[str], str | None] = lambda device: None
    grows: bool = False


def _scored(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    mask = labels != IGNORE_INDEX
    return hidden[mask], labels[mask]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits of every position, cross-entropy in float32: what a model's own loss does."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORE_INDEX)


def plain_compact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return plain(*_compact(hidden, weight, labels))


def _compact(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, targets = _scored(hidden, labels)
    return rows, weight, targets


def torch_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's chunked `linear_cross_entropy` with the options it chooses itself, on scored rows."""
    fused: Any = F.linear_cross_entropy  # type: ignore[attr-defined]
    options: Any = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return fused(*_compact(hidden, weight, labels), options=options)


def _no_torch_fused(device: str) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no linear_cross_entropy"


def _trl(hidden: Tensor, weight: Tensor, labels: Tensor, *, is_compact: bool) -> Tensor:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    mask = labels != IGNORE_INDEX
    rows, targets = (hidden[mask], labels[mask]) if is_compact else (hidden, labels.clamp(min=0))
    outputs = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks for
    logps = _ChunkedLogProbFunction.apply(
        rows, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
    )[0]
    return -(logps if is_compact else logps.masked_fill(~mask, 0)).sum() / mask.sum()


def trl_shipped(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's kernel as SFTTrainer calls it: scored rows on CUDA, every position on a CPU."""
    return _trl(hidden, weight, labels, is_compact=hidden.is_cuda)


def trl_compact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's kernel on scored rows everywhere."""
    return _trl(hidden, weight, labels, is_compact=True)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy on scored rows, gradients accumulated in float32."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    rows, targets = _scored(hidden, labels)
    return LigerFusedLinearCrossEntropyFunction.apply(
        rows, weight.to(rows.dtype), targets, None, None, IGNORE_INDEX, 0.0, 0.0, "mean", None, False, torch.float32
    )[0]


def _no_liger(device: str) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if device == "cuda" else "it is a Triton kernel and needs a GPU"


def ours_differentiable(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`psft.ops.token_statistics`: log-prob, entropy and top-1, any loss on top, four products."""
    rows, targets = _scored(hidden, labels)
    scored = token_statistics(rows, weight, targets)
    return sft_loss(scored.logps, torch.ones_like(targets, dtype=torch.bool), normalizer=len(targets)).loss


def token_mean_nll(rows: Tensor, weight: Tensor, targets: Tensor, normalizer: Tensor | float) -> Tensor:
    """Summed negative log-probability of scored rows over `normalizer`, by the fastest of our operations."""

    def chunk_loss(scored: TokenStatistics, which: slice) -> ObjectiveOutput:
        return sft_loss(scored.logps, torch.ones_like(scored.is_top1), normalizer=normalizer)

    return token_loss(rows, weight, targets, chunk_loss).loss


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`psft.ops.token_loss`: log-prob, entropy, top-1, and the gradient in the same pass, three products."""
    rows, targets = _scored(hidden, labels)
    return token_mean_nll(rows, weight, targets, len(targets))


def ours_psft(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with the clipped ratio, at ratio 1: loss -1, gradient of the nll."""
    rows, targets = _scored(hidden, labels)

    def chunk_loss(scored: TokenStatistics, which: slice) -> ObjectiveOutput:
        mask = torch.ones_like(scored.is_top1)
        return psft_loss(scored.logps, scored.logps.detach(), mask, normalizer=len(targets))

    return token_loss(rows, weight, targets, chunk_loss).loss


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("plain_all", plain, grows=True),
        Peer("plain_compact", plain_compact, grows=True),
        Peer("trl_shipped", trl_shipped),
        Peer("trl_compact", trl_compact),
        Peer("torch_fused", torch_fused, _no_torch_fused),
        Peer("liger", liger, _no_liger),
        Peer("ours_differentiable", ours_differentiable),
        Peer("ours", ours),
        Peer("ours_psft", ours_psft),
    )
}
