"""The LM head on chunks of rows: logits, what is read off them, and gradients of that on the way back.

The full (tokens x vocabulary) matrix never exists. A chunk of rows is projected into a buffer that every chunk reuses;
what is read off it is computed block by block, a few dozen rows at a time, so that on a CPU a block stays in cache from
its first pass to its last. Logits, statistics and gradients are float32 (float64 for float64 input), whatever the
hidden states are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from psft.ops.products import add_at, product, product_dtype, project
from psft.ops.vocabulary import ReferenceLogits, Rows, VocabularyQuantity, check_reference

CHUNK_ROWS = 512
"""Rows projected at a time. Each chunk reads the head twice and adds to its gradient once, which its rows share."""

_BLOCK_ROWS = 64  # on a CPU: 64 x 49k float32 logits = 12 MB; an accelerator takes the chunk whole
_LEAST_LOGP = -1e4  # nats; below it a probability is 0 in any type, and 0 * -inf would be nan


class TokenStatistics(NamedTuple):
    """(N,) each, for N target tokens. `entropies` and `is_top1` are None where only log-probs were asked for."""

    logps: Tensor  # nats; differentiable
    entropies: Tensor  # nats; differentiable
    is_top1: Tensor  # bool, no gradient: every other token is less likely
    quantities: dict[str, Tensor] = {}  # by name; each says itself whether it is differentiable


class HeadSettings(NamedTuple):
    """How logits are made of hidden states, and what is read off them beside log-prob, entropy and top-1 hit."""

    logit_scale: float
    softcap: float | None
    chunk_rows: int
    quantities: tuple[VocabularyQuantity, ...]
    reference: ReferenceLogits | None
    product_dtype: torch.dtype


def checked_settings(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
    chunk_rows: int,
    quantities: tuple[VocabularyQuantity, ...],
    reference: ReferenceLogits | None,
) -> HeadSettings:
    """The settings; the reference only if a quantity needs it. Raises ValueError: what does not fit, by name."""
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"want hidden (N, H), weight (V, H), labels (N,); got {tuple(hidden.shape)}, {tuple(weight.shape)}, "
            f"{tuple(labels.shape)}"
        )
    check_reference(len(labels), len(weight), quantities, reference)
    is_needed = any(quantity.needs_reference for quantity in quantities)
    return HeadSettings(
        float(logit_scale), softcap, int(chunk_rows), tuple(quantities), reference if is_needed else None,
        product_dtype(hidden),
    )  # fmt: skip


class RowGradients(NamedTuple):
    """Gradient of a loss with respect to the statistics of a chunk, (rows,) each. None = none, and costs nothing."""

    logps: Tensor | None
    entropies: Tensor | None
    quantities: tuple[tuple[VocabularyQuantity, Tensor], ...]


class HeadGradients:
    """What the chunks' gradients add up to, in the type of the statistics: hidden (N, H), weight (V, H), bias (V,).

    Each is shaped like the tensor given, or None where that is None, and holds anything until the chunks are in.
    """

    def __init__(self, dtype: torch.dtype, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = (
            None if x is None else torch.empty(x.shape, dtype=dtype, device=x.device) for x in (hidden, weight, bias)
        )
        if self.bias is not None:
            self.bias.zero_()
        self.has_rows = False


class ChunkedHead:
    """One head over N rows of hidden states, one chunk of rows at a time.

        for rows in head.chunks():
            statistics = head.score(rows)           # of these rows; their probabilities stay until the next call
            head.add_gradients(rows, grads, into)   # at most once a chunk: it uses them up

    To be made and used with gradients and autocast off. The same inputs and chunks give the same log-probs to the bit,
    whether or not the other statistics and the gradients are computed.

    keeps_logits: the gradient of a quantity, or a soft cap, will need the chunk's logits beside its probabilities,
        which else take their place.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        settings: HeadSettings,
        *,
        keeps_logits: bool,
    ) -> None:
        self.hidden, self.labels, self.settings = hidden.detach(), labels[:, None], settings
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.weight = weight.detach().to(settings.product_dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        num_rows = min(len(hidden), settings.chunk_rows)
        self._block_rows = max(min(num_rows, _BLOCK_ROWS) if hidden.device.type == "cpu" else num_rows, 1)

        def buffer(rows: int, width: int = len(weight)) -> Tensor:
            return torch.empty(rows, width, dtype=self.dtype, device=hidden.device)

        self._logits, self._scratch = buffer(num_rows), buffer(self._block_rows)
        self._keeps_logits = keeps_logits
        self._probs = buffer(num_rows) if keeps_logits else self._logits
        self._tops, self._log_norms, self._entropies = (buffer(num_rows, 1) for _ in range(3))
        if settings.reference is not None:
            self._ref_weight = settings.reference.weight.detach().to(settings.product_dtype)
            self._ref_log_probs = buffer(num_rows)

    def chunks(self) -> Iterator[slice]:
        """Slices of rows; a single empty one if there is no row, so that each caller's loop runs."""
        num_rows = len(self.hidden)
        for start in range(0, max(num_rows, 1), self.settings.chunk_rows):
            yield slice(start, min(start + self.settings.chunk_rows, num_rows))

    def score(self, rows: slice, *, logps_only: bool = False) -> TokenStatistics:
        """Project a chunk of rows and read it off."""
        settings, labels = self.settings, self.labels[rows]
        num_rows = len(labels)
        logits = self._logits[:num_rows]
        project(self.hidden[rows], self.weight, self.bias, settings.logit_scale, settings.softcap, out=logits)
        if settings.reference is not None:
            self._score_reference(settings.reference, rows)
        logps = logits.new_empty(num_rows, 1)
        entropies, is_top1 = self._entropies[:num_rows], torch.empty_like(logps, dtype=torch.bool)
        quantities = [torch.empty_like(logps[:, 0]) for _ in settings.quantities]
        for block in self._blocks(num_rows):
            z, target = logits[block], labels[block]
            target_logits = z.gather(1, target)
            rivals = z.scatter_(1, target, -torch.inf).amax(1, keepdim=True)  # several times faster than argmax
            z.scatter_(1, target, target_logits)
            top = self._tops[block] = torch.maximum(rivals, target_logits)
            z = torch.sub(z, top, out=z if self._keeps_logits else self._scratch[: len(z)])
            p = torch.softmax(z, -1, out=self._probs[block])
            log_norm = self._log_norms[block] = -p.amax(1, keepdim=True).log()  # log sum exp z: the largest z is 0
            logps[block] = target_logits - top - log_norm
            if logps_only:
                continue
            is_top1[block] = target_logits > rivals
            of_block = self._rows(block, target)._replace(logits=z)
            for quantity, values in zip(settings.quantities, quantities, strict=True):
                values[block] = quantity.values(of_block)
            surprises = torch.mul(z, p, out=self._scratch[: len(z)])
            entropies[block] = log_norm - surprises.nansum(1, keepdim=True)  # nan: -inf * 0
        if logps_only:
            return TokenStatistics(logps[:, 0], None, None)  # type: ignore[arg-type]
        named = {q.name: values for q, values in zip(settings.quantities, quantities, strict=True)}
        return TokenStatistics(logps[:, 0], entropies[:, 0].clone(), is_top1[:, 0], named)

    def add_gradients(self, rows: slice, grads: RowGradients, into: HeadGradients) -> None:
        """Add what the chunk last scored gives to the gradients of hidden states, head and bias.

        The gradient of an entropy or a quantity needs it to have been computed: not after `logps_only`.
        """
        labels, hidden = self.labels[rows], self.hidden[rows]
        grad_logits = self._probs[: len(labels)]
        if grads.entropies is None and not grads.quantities and self.settings.softcap is None:
            # d log p_y / dz = onehot(y) - p. A token's coefficient is applied further down, to fewer numbers than here.
            add_at(grad_logits, labels, -1.0)
            coefficients = torch.zeros_like(self._tops[: len(labels), 0]) if grads.logps is None else grads.logps
            factor = coefficients[:, None] * -self.settings.logit_scale
        else:
            for block in self._blocks(len(labels)):
                grad_logits[block] = self._logit_gradient(block, labels[block], grads)
            factor = torch.full_like(self._tops[: len(labels)], self.settings.logit_scale)
        if into.bias is not None:
            into.bias.addmv_(grad_logits.T, factor[:, 0])
        if self.weight.dtype == torch.bfloat16:  # on CUDA: products of bfloat16, added up in float32
            grad_logits = torch.mul(grad_logits, factor, out=torch.empty_like(grad_logits, dtype=torch.bfloat16))
            hidden, factor = hidden.to(torch.bfloat16), torch.ones_like(factor)
        else:
            hidden = hidden.to(self.dtype) * factor
        if into.hidden is not None:
            product(grad_logits, self.weight, out=into.hidden[rows]).mul_(factor)
        if into.weight is not None:
            product(grad_logits.T, hidden, out=into.weight, is_added=into.has_rows)
        into.has_rows = True

    def _logit_gradient(self, block: slice, labels: Tensor, grads: RowGradients) -> Tensor:
        """(rows of the block, V): the gradient of the loss with respect to the logits before their scale."""
        rows = self._rows(block, labels)
        out = self._scratch[: len(labels)]
        if grads.entropies is not None:  # dH / dz_v = -p_v (log p_v + H)
            torch.log(rows.probs, out=out).clamp_(min=_LEAST_LOGP).add_(self._entropies[block])
            out.mul_(grads.entropies[block, None])
            if grads.logps is not None:
                out.add_(grads.logps[block, None])
            out.mul_(rows.probs).neg_()
        elif grads.logps is not None:
            torch.mul(rows.probs, -grads.logps[block, None], out=out)
        else:
            out.zero_()
        if grads.logps is not None:
            add_at(out, labels, grads.logps[block, None])
        for quantity, grad in grads.quantities:
            quantity.add_logit_gradient(rows, grad[block, None], out)
        softcap = self.settings.softcap
        if softcap is not None:  # logits = c tanh(raw / c), so dlogits/draw = 1 - (logits / c)^2
            out.mul_(1 - (rows.logits + self._tops[block]).div_(softcap).square_())
        return out

    def _score_reference(self, reference: ReferenceLogits, rows: slice) -> None:
        log_probs = self._ref_log_probs[: rows.stop - rows.start]
        hidden, bias = reference.hidden[rows].detach(), reference.bias
        bias = None if bias is None else bias.detach().to(self.dtype)
        project(hidden, self._ref_weight, bias, reference.logit_scale, reference.softcap, out=log_probs)
        for block in self._blocks(len(log_probs)):
            z = log_probs[block]
            z.sub_(z.amax(1, keepdim=True))
            probs = torch.softmax(z, -1, out=self._scratch[: len(z)])
            z.add_(probs.amax(1, keepdim=True).log_())

    def _rows(self, block: slice, labels: Tensor) -> Rows:
        ref_log_probs = None if self.settings.reference is None else self._ref_log_probs[block]
        return Rows(self._logits[block], self._probs[block], self._log_norms[block], labels, ref_log_probs)

    def _blocks(self, num_rows: int) -> Iterator[slice]:
        for start in range(0, num_rows, self._block_rows):
            yield slice(start, min(start + self._block_rows, num_rows))
