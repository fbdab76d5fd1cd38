"""Plain twins of the fused operations: a reader's definition and the tests' ground truth. Memory is no object here."""

from typing import Any

import torch
from torch import Tensor

from psft.ops.lm_head import TokenStatistics
from psft.ops.token_loss import ChunkLoss, TokenLoss
from psft.ops.vocabulary import GemGap, ReferenceLogits, RefKl, TopKEntropy, VocabularyQuantity, check_reference


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int = 0,
    quantities: tuple[VocabularyQuantity, ...] = (),
    reference: ReferenceLogits | None = None,
    logps_only: bool = False,
) -> TokenStatistics:
    """As `psft.ops.token_statistics`, by autograd through the full (N, V) logits.

    `chunk_rows` and `logps_only` have no effect.
    """
    check_reference(len(labels), len(weight), quantities, reference)
    logits = _logits(hidden, weight, bias, logit_scale, softcap)
    ref_logits = None if reference is None else _logits(*reference).detach()
    log_softmax = torch.log_softmax(logits, -1)
    return TokenStatistics(
        logps=log_softmax.gather(1, labels[:, None])[:, 0],
        entropies=-(log_softmax.exp() * log_softmax).sum(-1),
        is_top1=logits.gather(1, labels[:, None])[:, 0] > logits.scatter(1, labels[:, None], -torch.inf).amax(-1),
        quantities={q.name: vocabulary_quantity(q, logits, labels, ref_logits) for q in quantities},
    )


def token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_loss: ChunkLoss, *, chunk_rows: int = 0, **how: Any
) -> TokenLoss:
    """As `psft.ops.token_loss`, evaluated on all tokens at once and differentiated by autograd."""
    statistics = token_statistics(hidden, weight, labels, **how)
    loss, metrics = chunk_loss(statistics, slice(0, len(labels)))
    return TokenLoss(loss, metrics, statistics)


def vocabulary_quantity(
    quantity: VocabularyQuantity, logits: Tensor, labels: Tensor, ref_logits: Tensor | None
) -> Tensor:
    """(N,) from full (N, V) logits: GEM's gap, the KL to the reference, or the top-k entropy."""
    logp = logits.log_softmax(-1)
    target = labels[:, None]
    if isinstance(quantity, GemGap):
        with torch.no_grad():
            weights = (logits / quantity.gem_beta).softmax(-1)
            if quantity.gem_weighting == "logsigmoid":
                weights = weights * torch.sigmoid(0.01 * (logits - logits.gather(1, target)))
        return (weights * (logp.gather(1, target) - logp)).sum(-1)
    if isinstance(quantity, RefKl):
        assert ref_logits is not None, "check_reference has seen to it"
        ref_logp = ref_logits.log_softmax(-1)
        if quantity.kl_direction == "forward":
            return (ref_logp.exp() * (ref_logp - logp)).sum(-1)
        return (logp.exp() * (logp - ref_logp)).sum(-1)
    if isinstance(quantity, TopKEntropy):
        largest = logits.detach().topk(min(quantity.eaft_top_k, logits.shape[1])).values
        return -(largest.softmax(-1) * largest.log_softmax(-1)).sum(-1)
    raise TypeError(f"no plain twin for {type(quantity).__name__}")


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
