"""Draws the next token of every row of a batch with random numbers of the row's own.

`generate`'s own sampling has one stream of random numbers for the whole batch: what a row gets depends on its
neighbours and on what was drawn before. Here row i's numbers depend on its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from psft.evaluation.benchmarks import Sampling

_BLOCK = 64  # random numbers drawn at a time
_FIRST_CANDIDATES = 256  # likeliest tokens looked at before the whole vocabulary is sorted


class RowSampler(LogitsProcessor):
    """Makes `generate(do_sample=False)` sample: every token but the drawn one gets a score of -inf.

    So every cache and model class of transformers works. seeds: one a row.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self.sampling = sampling
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._numbers = torch.zeros(len(seeds), 0, dtype=torch.float64)
        self._used = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = draw_tokens(scores, self._uniforms().to(scores.device), self.sampling)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def _uniforms(self) -> Tensor:
        """(B,) float64, each row's next number."""
        if self.sampling.temperature == 0:
            return torch.zeros(len(self._generators), dtype=torch.float64)
        if self._used == self._numbers.shape[1]:
            rows = [torch.rand(_BLOCK, generator=g, dtype=torch.float64) for g in self._generators]
            self._numbers, self._used = torch.stack(rows), 0
        self._used += 1
        return self._numbers[:, self._used - 1]


def draw_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """(B,) token ids by inverting the distribution function that temperature, top_k and top_p leave, in this order.

    Args:
        logits: (B, V). uniforms: (B,) float64 in [0, 1).
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.double() / sampling.temperature
    vocabulary = logits.shape[-1]
    if sampling.top_p >= 1 and not sampling.top_k:
        return _invert(torch.softmax(scaled, dim=-1), uniforms)
    num = min(vocabulary, sampling.top_k or _FIRST_CANDIDATES)
    values, ids = scaled.topk(num, dim=-1)
    total = values.logsumexp(dim=-1, keepdim=True) if sampling.top_k else scaled.logsumexp(dim=-1, keepdim=True)
    probs = (values - total).exp()
    if not sampling.top_k and num < vocabulary and bool((probs.sum(dim=-1) < sampling.top_p).any()):
        values, ids = scaled.sort(dim=-1, descending=True)  # flat distributions: the bound lies further down
        probs = (values - total).exp()
    before = probs.cumsum(dim=-1) - probs
    probs = torch.where(before < sampling.top_p, probs, 0.0)  # the smallest set that holds top_p; never empty
    return ids.gather(1, _invert(probs, uniforms)[:, None])[:, 0]


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) index at which the cumulated probability (not necessarily of sum 1) passes uniforms times its end."""
    cumulated = probs.cumsum(dim=-1)
    index = torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)[:, 0]
    last = (probs > 0).to(torch.int64).mul(torch.arange(1, probs.shape[-1] + 1, device=probs.device)).amax(dim=-1) - 1
    return torch.minimum(index, last)  # rounding must not run past the last token that may be drawn
