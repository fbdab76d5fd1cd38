"""Log-probability, entropy, top-1 hit and vocabulary quantities of each target token, differentiable.

Four matrix products in all: the backward pass projects each chunk of rows again (logits twice, hidden gradient, weight
gradient), and two more where a reference's logits are asked for. A loss whose every term belongs to one token is
cheaper by `token_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from psft.ops.lm_head import (
    CHUNK_ROWS,
    ChunkedHead,
    HeadGradients,
    HeadSettings,
    RowGradients,
    TokenStatistics,
    checked_settings,
)
from psft.ops.vocabulary import ReferenceLogits, VocabularyQuantity


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int = CHUNK_ROWS,
    quantities: tuple[VocabularyQuantity, ...] = (),
    reference: ReferenceLogits | None = None,
    logps_only: bool = False,
) -> TokenStatistics:
    """Score target tokens under softmax(softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)).

    Same values as `psft.ops.reference.token_statistics`, without its (N, V) memory. Gradients are of first order.

    Args:
        hidden: (N, H) float, N >= 0.
        weight: (V, H) float, the LM head.
        labels: (N,) int64 in [0, V).
        bias: (V,) float or None.
        logit_scale: factor on the logits (Cohere, Granite and others); 1 for most models.
        softcap: bound of the logits (Gemma 2); None for most models.
        chunk_rows: rows projected at a time. The result does not depend on it up to rounding.
        quantities: what else to compute from each row of logits.
        reference: the frozen reference's hidden states and head, for the quantities that need them.
        logps_only: leave out entropies and top-1 hits; the log-probs are the same to the bit.
    Raises:
        ValueError: shapes that do not fit, or a quantity that needs a reference without one.
    """
    if logps_only and quantities:
        raise ValueError("logps_only leaves the quantities out; ask for one of the two")
    settings = checked_settings(
        hidden, weight, labels, logit_scale=logit_scale, softcap=softcap, chunk_rows=chunk_rows, quantities=quantities,
        reference=reference,
    )  # fmt: skip
    logps, entropies, is_top1, *extra = _TokenStatistics.apply(hidden, weight, bias, labels, settings, logps_only)
    return TokenStatistics(logps, entropies, is_top1, {q.name: x for q, x in zip(quantities, extra, strict=True)})


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        settings: HeadSettings,
        logps_only: bool,
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, bias, labels, settings, keeps_logits=False)
            chunks = [head.score(rows, logps_only=logps_only) for rows in head.chunks()]
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.settings = settings
        ctx.set_materialize_grads(False)  # an unused entropy must not cost a pass over the vocabulary
        logps = torch.cat([chunk.logps for chunk in chunks])
        if logps_only:
            return logps, None, None
        is_top1 = torch.cat([chunk.is_top1 for chunk in chunks])
        extra = [torch.cat([chunk.quantities[q.name] for chunk in chunks]) for q in settings.quantities]
        constant = [x for q, x in zip(settings.quantities, extra, strict=True) if not q.is_differentiable]
        ctx.mark_non_differentiable(is_top1, *constant)
        return logps, torch.cat([chunk.entropies for chunk in chunks]), is_top1, *extra

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logps, grad_entropies, _, *grad_extra = grads
        hidden, weight, bias, labels = ctx.saved_tensors
        settings: HeadSettings = ctx.settings
        inputs = (hidden, weight, bias)
        wanted = [x if needed else None for x, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)]
        pulled = [
            (quantity, grad)
            for quantity, grad in zip(settings.quantities, grad_extra, strict=True)
            if grad is not None and quantity.is_differentiable
        ]
        needs_reference = any(quantity.needs_reference for quantity, _ in pulled)
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(
                hidden, weight, bias, labels,
                settings._replace(quantities=(), reference=settings.reference if needs_reference else None),
                keeps_logits=bool(pulled) or settings.softcap is not None,
            )  # fmt: skip
            total = HeadGradients(head.dtype, *wanted)
            for rows in head.chunks():
                head.score(rows, logps_only=grad_entropies is None)
                of_rows = RowGradients(
                    None if grad_logps is None else grad_logps[rows],
                    None if grad_entropies is None else grad_entropies[rows],
                    tuple((quantity, grad[rows]) for quantity, grad in pulled),
                )
                head.add_gradients(rows, of_rows, total)
        in_type = zip((total.hidden, total.weight, total.bias), inputs, strict=True)
        return *(None if grad is None else grad.to(x.dtype) for grad, x in in_type), None, None, None
