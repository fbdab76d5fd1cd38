"""A loss whose every term belongs to one token, with its gradients computed in the forward pass: three products.

What such a loss sends back to a token's logits depends on nothing but that token's own numbers. So while a chunk of
logits is there, its part of the loss is evaluated, differentiated and turned into gradients of the hidden states and
the head; nothing is projected twice, and the backward pass only multiplies by what comes from above. One more product
where a reference's logits are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from psft.ops.lm_head import (
    CHUNK_ROWS,
    ChunkedHead,
    HeadGradients,
    RowGradients,
    TokenStatistics,
    checked_settings,
)
from psft.ops.vocabulary import ReferenceLogits, VocabularyQuantity

ChunkLoss = Callable[[TokenStatistics, slice], tuple[Tensor, dict[str, Tensor]]]
"""(statistics of some tokens, which of the N tokens they are) -> (their share of the loss, scalar; metrics to add up).

The statistics are leaves: a loss may be differentiated through any of them that is differentiable."""


class TokenLoss(NamedTuple):
    """loss: scalar, differentiable once. metrics: sums over the tokens. statistics: (N,) each, without gradient."""

    loss: Tensor
    metrics: dict[str, Tensor]
    statistics: TokenStatistics


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_loss: ChunkLoss,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int = CHUNK_ROWS,
    quantities: tuple[VocabularyQuantity, ...] = (),
    reference: ReferenceLogits | None = None,
) -> TokenLoss:
    """Sum of `chunk_loss` over chunks of target tokens, scored as by `token_statistics`.

    Same values and gradients as `chunk_loss(token_statistics(...), slice(0, N))` followed by `backward`, provided that
    the loss is a sum of one term a token and no term looks at another token. Without gradients (`torch.no_grad`, or
    inputs that need none) only the values are computed. The log-probs are those of `token_statistics` to the bit.

    Args:
        chunk_loss: see `ChunkLoss`; called once a chunk, and once with no token if N = 0.
        The others: as in `token_statistics`.
    Raises:
        ValueError: as `token_statistics`; or a gradient is wanted and the loss does not depend on the statistics.
        RuntimeError: a second backward pass: the gradients were handed over in the first.
    """
    settings = checked_settings(
        hidden, weight, labels, logit_scale=logit_scale, softcap=softcap, chunk_rows=chunk_rows, quantities=quantities,
        reference=reference,
    )  # fmt: skip
    inputs = (hidden, weight, bias)
    wanted = [x if torch.is_grad_enabled() and x is not None and x.requires_grad else None for x in inputs]
    has_gradient = any(x is not None for x in wanted)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        keeps_logits = has_gradient and (softcap is not None or any(q.is_differentiable for q in quantities))
        head = ChunkedHead(hidden, weight, bias, labels, settings, keeps_logits=keeps_logits)
        gradients = HeadGradients(head.dtype, *wanted)
        chunks, losses = [], []
        metrics: dict[str, Tensor] = {}
        for rows in head.chunks():
            statistics = head.score(rows)
            loss, more, of_rows = _evaluated(chunk_loss, statistics, rows, quantities, has_gradient=has_gradient)
            if of_rows is not None:
                head.add_gradients(rows, of_rows, gradients)
            chunks.append(statistics)
            losses.append(loss)
            metrics = {name: value if name not in metrics else metrics[name] + value for name, value in more.items()}
    loss = torch.stack(losses).sum()
    if has_gradient:
        loss = _WithGradients.apply(loss, gradients, *inputs)
    joined = {q.name: torch.cat([chunk.quantities[q.name] for chunk in chunks]) for q in quantities}
    logps, entropies, is_top1 = (torch.cat(values) for values in list(zip(*chunks, strict=True))[:3])
    return TokenLoss(loss, metrics, TokenStatistics(logps, entropies, is_top1, joined))


def _evaluated(
    chunk_loss: ChunkLoss,
    statistics: TokenStatistics,
    rows: slice,
    quantities: tuple[VocabularyQuantity, ...],
    *,
    has_gradient: bool,
) -> tuple[Tensor, dict[str, Tensor], RowGradients | None]:
    """The chunk's share of loss and metrics, and the loss's gradient with respect to the statistics if wanted."""
    if not has_gradient:
        loss, metrics = chunk_loss(statistics, rows)
        return loss.detach(), metrics, None
    with torch.enable_grad():
        differentiable = [q for q in quantities if q.is_differentiable]
        logps, entropies, *extra = (
            x.detach().requires_grad_()
            for x in (statistics.logps, statistics.entropies, *(statistics.quantities[q.name] for q in differentiable))
        )
        named = {**statistics.quantities, **{q.name: x for q, x in zip(differentiable, extra, strict=True)}}
        loss, metrics = chunk_loss(TokenStatistics(logps, entropies, statistics.is_top1, named), rows)
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on logps, entropies or a differentiable quantity, so it has no gradient"
            )
        grads = torch.autograd.grad(loss, [logps, entropies, *extra], allow_unused=True)
    pulled = tuple((q, grad) for q, grad in zip(differentiable, grads[2:], strict=True) if grad is not None)
    return loss.detach(), metrics, RowGradients(grads[0], grads[1], pulled)


class _WithGradients(torch.autograd.Function):
    """Give a computed loss the gradients that were computed with it. They are handed over, not copied: once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: HeadGradients, *inputs: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss has been differentiated before and its gradients were handed over then")
        is_one, scaled = _is_one(grad_loss), []
        for grad, dtype in zip((gradients.hidden, gradients.weight, gradients.bias), ctx.dtypes, strict=True):
            if grad is not None:
                # Scaled before it is rounded to its input's type: a loss scaler's factor keeps float16 from underflow.
                grad = (grad if is_one else grad.mul_(grad_loss)).to(dtype)
            scaled.append(grad)
        return None, None, *scaled


def _is_one(factor: Tensor) -> bool:
    """Whether a factor is known to change nothing. On an accelerator nobody waits to be told."""
    return factor.device.type == "cpu" and factor.item() == 1.0
