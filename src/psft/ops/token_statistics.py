"""Log-probability, entropy, top-1 hit and vocabulary quantities of each target token, in chunks of rows.

The full (tokens x vocabulary) logits never exist: each chunk of rows is projected, reduced and dropped, and
the backward projects it again. Four matrix products in all (logits twice, hidden gradient, weight gradient), two more
where a reference's logits are asked for. Logits, statistics and the weight gradient are float32 (float64 for float64
input), whatever the hidden states are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from psft.ops.vocabulary import ReferenceLogits, Rows, VocabularyQuantity, expectation

CHUNK_ROWS = 256  # 256 x 49k float32 logits = 50 MB; 256 to 512 rows were fastest on CPU


class TokenStatistics(NamedTuple):
    """(N,) each, for N target tokens."""

    logps: Tensor  # nats; differentiable
    entropies: Tensor  # nats; differentiable
    is_top1: Tensor  # bool; no gradient
    quantities: dict[str, Tensor] = {}  # by name; each says itself whether it is differentiable


class _Settings(NamedTuple):
    logit_scale: float
    softcap: float | None
    chunk_rows: int
    quantities: tuple[VocabularyQuantity, ...]
    reference: ReferenceLogits | None


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
    Raises:
        ValueError: shapes that do not fit, or a quantity that needs a reference without one.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"want hidden (N, H), weight (V, H), labels (N,); got {tuple(hidden.shape)}, {tuple(weight.shape)}, "
            f"{tuple(labels.shape)}"
        )
    check_reference(len(labels), len(weight), quantities, reference)
    settings = _Settings(float(logit_scale), softcap, int(chunk_rows), tuple(quantities), reference)
    logps, entropies, is_top1, *extra = _TokenStatistics.apply(hidden, weight, bias, labels, settings)
    return TokenStatistics(logps, entropies, is_top1, {q.name: x for q, x in zip(quantities, extra, strict=True)})


def check_reference(
    num_tokens: int, num_words: int, quantities: tuple[VocabularyQuantity, ...], reference: ReferenceLogits | None
) -> None:
    """Raise `ValueError` if a quantity lacks its reference, or the reference scores other tokens or words."""
    wanting = [q.name for q in quantities if q.needs_reference and reference is None]
    if wanting:
        raise ValueError(f"{', '.join(wanting)} needs the reference's logits: give reference=ReferenceLogits(...)")
    if reference is not None and (len(reference.hidden), len(reference.weight)) != (num_tokens, num_words):
        raise ValueError(
            f"the reference has {len(reference.hidden)} tokens and {len(reference.weight)} words; "
            f"the policy {num_tokens} and {num_words}"
        )


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, settings: _Settings
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        num_rows = hidden.shape[0]
        logps = torch.empty(num_rows, dtype=dtype, device=hidden.device)
        entropies = torch.empty_like(logps)
        is_top1 = torch.empty(num_rows, dtype=torch.bool, device=hidden.device)
        extra = [torch.empty_like(logps) for _ in settings.quantities]
        for rows, chunk in _chunks(hidden, weight, bias, labels, settings, dtype):
            target = chunk.labels[:, None]
            is_top1[rows] = chunk.logits.argmax(-1) == target[:, 0]
            logps[rows] = chunk.log_softmax.gather(1, target)[:, 0]
            entropies[rows] = -expectation(chunk.log_softmax.exp(), chunk.log_softmax)
            for quantity, values in zip(settings.quantities, extra, strict=True):
                values[rows] = quantity.values(chunk)
        ctx.save_for_backward(hidden, weight, bias, labels, entropies)
        ctx.settings = settings
        constant = [x for q, x in zip(settings.quantities, extra, strict=True) if not q.is_differentiable]
        ctx.mark_non_differentiable(is_top1, *constant)
        ctx.set_materialize_grads(False)  # an unused entropy must not cost a pass over the vocabulary
        return logps, entropies, is_top1, *extra

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logps, grad_entropies, _, *grad_extra = grads
        hidden, weight, bias, labels, entropies = ctx.saved_tensors
        settings = ctx.settings
        dtype = entropies.dtype
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and want_bias else None
        wanted = [
            (q, grad.to(dtype))
            for q, grad in zip(settings.quantities, grad_extra, strict=True)
            if grad is not None and q.is_differentiable
        ]
        without_unused = settings._replace(
            quantities=tuple(q for q, _ in wanted),
            reference=settings.reference if any(q.needs_reference for q, _ in wanted) else None,
        )
        matrix = _for_product(weight, dtype)
        for rows, chunk in _chunks(hidden, weight, bias, labels, without_unused, dtype):
            probs = chunk.log_softmax.exp()
            grad_logits = torch.zeros_like(probs)
            if grad_logps is not None:  # d log p_y / dz = onehot(y) - p
                grad = grad_logps[rows, None].to(dtype)
                grad_logits.addcmul_(probs, grad, value=-1.0).scatter_add_(1, chunk.labels[:, None], grad)
            if grad_entropies is not None:  # dH / dz_v = -p_v (log p_v + H)
                surprise = torch.where(probs > 0, chunk.log_softmax + entropies[rows, None], 0.0)
                grad_logits.addcmul_(probs * surprise, grad_entropies[rows, None].to(dtype), value=-1.0)
            for quantity, grad in wanted:
                quantity.add_logit_gradient(chunk, grad[rows, None], grad_logits)
            if settings.softcap is not None:  # logits = c tanh(raw / c), so dlogits/draw = 1 - (logits / c)^2
                grad_logits.mul_(1 - (chunk.logits / settings.softcap).square())
            grad_logits.mul_(settings.logit_scale)
            with torch.autocast(hidden.device.type, enabled=False):
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
        )


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, settings: _Settings, dtype: torch.dtype
) -> Any:
    """Yield (slice of rows, their `Rows`), one chunk alive at a time."""
    reference = settings.reference
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = _for_product(weight, dtype)
        ref_matrix = None if reference is None else _for_product(reference.weight.detach(), dtype)
    for start in range(0, hidden.shape[0], settings.chunk_rows):
        rows = slice(start, start + settings.chunk_rows)
        ref_log_softmax = None
        with torch.autocast(hidden.device.type, enabled=False):
            logits = _logits(hidden[rows], matrix, bias, settings.logit_scale, settings.softcap, dtype)
            if reference is not None and ref_matrix is not None:
                ref_hidden = reference.hidden[rows].detach()
                ref_logits = _logits(
                    ref_hidden, ref_matrix, reference.bias, reference.logit_scale, reference.softcap, dtype
                )
                ref_log_softmax = torch.log_softmax(ref_logits, -1)
            log_softmax = torch.log_softmax(logits, -1)
        yield rows, Rows(logits, log_softmax, labels[rows], ref_log_softmax)


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
        logits += bias.detach().to(dtype)
    if logit_scale != 1.0:
        logits *= logit_scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
