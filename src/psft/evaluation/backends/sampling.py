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
_FIRST_CANDIDATES, _MORE_CANDIDATES = 256, 16  # likeliest tokens looked at first, and how many times more each time


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
        return torch.full_like(scores, -torch.inf).scatter_(1, self.draw(scores)[:, None], 0.0)

    def draw(self, logits: Tensor) -> Tensor:
        """(B, V) logits -> (B,) the next tokens."""
        return draw_tokens(logits, self._uniforms().to(logits.device), self.sampling)

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
    # Weights relative to the likeliest token, in float32 as the model computes them; only their sums are float64.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature).exp()
    if sampling.top_k:
        values, ids = weights.topk(min(sampling.top_k, weights.shape[-1]), dim=-1)
        return ids.gather(1, _draw_sorted(values.double(), uniforms, sampling.top_p)[:, None])[:, 0]
    if sampling.top_p >= 1:
        return _invert(weights.double(), uniforms)
    return _draw_nucleus(weights, uniforms, sampling.top_p)


def _draw_nucleus(weights: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """(B,) token ids out of the smallest sets that hold top_p of each row's (B, V) weights.

    Sorting a whole vocabulary costs as much as a small model: rows whose set is larger than the likeliest 256 tokens
    are rare, and they alone are looked at again.
    """
    bounds = weights.sum(dim=-1, dtype=torch.float64) * top_p
    tokens = torch.empty(len(weights), dtype=torch.int64, device=weights.device)
    rows = torch.arange(len(weights), device=weights.device)
    num = _FIRST_CANDIDATES
    while len(rows):
        num = min(num, weights.shape[-1])
        values, ids = weights[rows].topk(num, dim=-1)
        sums = values.double().cumsum(dim=-1)
        is_whole = (sums[:, -1] >= bounds[rows]) | (num == weights.shape[-1])
        kept = torch.where(sums - values < bounds[rows, None], values.double(), 0.0)  # never empty
        tokens[rows] = ids.gather(1, _invert(kept, uniforms[rows])[:, None])[:, 0]  # of unfinished rows written again
        rows, num = rows[~is_whole], num * _MORE_CANDIDATES
    return tokens


def _draw_sorted(weights: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """(B,) index into (B, K) falling weights, the only ones there are."""
    sums = weights.cumsum(dim=-1)
    return _invert(torch.where(sums - weights < top_p * sums[:, -1:], weights, 0.0), uniforms)


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) index at which the cumulated probability (not necessarily of sum 1) passes uniforms times its end."""
    cumulated = probs.cumsum(dim=-1)
    index = torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)[:, 0]
    last = (probs > 0).to(torch.int64).mul(torch.arange(1, probs.shape[-1] + 1, device=probs.device)).amax(dim=-1) - 1
    return torch.minimum(index, last)  # rounding must not run past the last token that may be drawn
