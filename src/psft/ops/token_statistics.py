"""Log-probability, entropy and top-1 hit of each target token, from hidden states, in row chunks.

The full (tokens x vocabulary) logits never exist: each chunk of rows is projected, reduced and dropped, and
the backward projects it again. Four matrix products in all (logits twice, hidden gradient, weight gradient).
Logits, statistics and
the weight gradient are float32 (float64 for float64 input), whatever the hidden states are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_ROWS = 256  # 256 x 49k float32 logits = 50 MB; 256 to 512 rows were fastest on CPU


class TokenStatistics(NamedTuple):
    """(N,) each, for N target tokens."""

    logps: Tensor  # nats; differentiable
    entropies: Tensor  # nats; differentiable
    is_top1: Tensor  # bool; no gradient


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> TokenStatistics:
    """Score target tokens under softmax(softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)).

    Same values as `psft.ops.reference.token_statistics`, without its (N, V) memory.

    Args:
        hidden: (N, H) float, N >= 0.
        weight: (V, H) float, the LM head.
        labels: (N,) int64 in [0, V).
        bias: (V,) float or None.
        logit_scale: factor on the logits (Cohere, Granite and others); 1 for most models.
        softcap: bound of the logits (Gemma 2); None for most models.
        chunk_rows: rows projected at a time. The result does not depend on it up to rounding.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"want hidden (N, H), weight (V, H), labels (N,); got {tuple(hidden.shape)}, {tuple(weight.shape)}, "
            f"{tuple(labels.shape)}"
        )
    return TokenStatistics(
        *_TokenStatistics.apply(hidden, weight, bias, labels, float(logit_scale), softcap, int(chunk_rows))
    )


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit_scale: float,
        softcap: float | None,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        num_rows = hidden.shape[0]
        logps = torch.empty(num_rows, dtype=dtype, device=hidden.device)
        entropies = torch.empty_like(logps)
        is_top1 = torch.empty(num_rows, dtype=torch.bool, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = _for_product(weight, dtype)
            for start in range(0, num_rows, chunk_rows):
                rows = slice(start, start + chunk_rows)
                logits = _logits(hidden[rows], matrix, bias, logit_scale, softcap, dtype)
                target = labels[rows, None]
                is_top1[rows] = logits.argmax(-1) == target[:, 0]
                log_softmax = torch.log_softmax(logits, -1)
                logps[rows] = log_softmax.gather(1, target)[:, 0]
                entropies[rows] = -_expectation(log_softmax.exp(), log_softmax)
        ctx.save_for_backward(hidden, weight, bias, labels, entropies)
        ctx.settings = (logit_scale, softcap, chunk_rows, dtype)
        ctx.mark_non_differentiable(is_top1)
        ctx.set_materialize_grads(False)  # an unused entropy must not cost a pass over the vocabulary
        return logps, entropies, is_top1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logps, grad_entropies, _ = grads
        hidden, weight, bias, labels, entropies = ctx.saved_tensors
        logit_scale, softcap, chunk_rows, dtype = ctx.settings
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and want_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = _for_product(weight, dtype)
            for start in range(0, hidden.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                logits = _logits(hidden[rows], matrix, bias, logit_scale, softcap, dtype)
                log_softmax = torch.log_softmax(logits, -1)
                probs = log_softmax.exp()
                grad_logits = torch.zeros_like(probs)
                if grad_logps is not None:  # d log p_y / dz = onehot(y) - p
                    grad = grad_logps[rows, None].to(dtype)
                    grad_logits.addcmul_(probs, grad, value=-1.0).scatter_add_(1, labels[rows, None], grad)
                if grad_entropies is not None:  # dH / dz_v = -p_v (log p_v + H)
                    surprise = torch.where(probs > 0, log_softmax + entropies[rows, None], 0.0)
                    grad_logits.addcmul_(probs * surprise, grad_entropies[rows, None].to(dtype), value=-1.0)
                if (
                    softcap is not None
                ):  # logits = softcap * tanh(raw / softcap), so dlogits/draw = 1 - (logits/softcap)^2
                    grad_logits.mul_(1 - (logits / softcap).square())
                grad_logits.mul_(logit_scale)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad_logits.to(matrix.dtype) @ matrix).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, hidden[rows].to(dtype))
                if grad_bias is not None:
                    grad_bias.add_(grad_logits.sum(0))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _for_product(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head in the type its products run in: half precision stays so on CUDA, whose GEMM can return float32."""
    return weight if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) else weight.to(dtype)


def _logits(
    hidden: Tensor, matrix: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, dtype: torch.dtype
) -> Tensor:
    if matrix.dtype == dtype:
        logits = hidden.to(dtype) @ matrix.T
    else:
        logits = torch.mm(hidden.to(matrix.dtype), matrix.T, out_dtype=dtype)
    if bias is not None:
        logits += bias.to(dtype)
    if logit_scale != 1.0:
        logits *= logit_scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _expectation(probs: Tensor, values: Tensor) -> Tensor:
    """(rows,) sum over the vocabulary of probs * values, with 0 * -inf = 0."""
    return torch.where(probs > 0, probs * values, 0.0).sum(-1)
