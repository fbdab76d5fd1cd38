"""Answers drawn from a model at temperature 1 and nothing else, the same whatever the batch, rank or global seed.

`generate` follows each model's own defaults (top-k, repetition penalties, ...), and those are not the distribution
whose drift the probe measures; so here every token comes from the plain softmax, by one uniform number of the answer's
own generator (inverse of the cumulative distribution).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from psft.models.decoding import decode


@torch.no_grad()
def sample_answers(
    forward: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    device: torch.device,
    runs_full_length: bool = False,
) -> list[list[int]]:
    """One answer to each prompt, as one batch.

    Args:
        forward: model call with `input_ids`, `attention_mask`, `position_ids`, `past_key_values`; gives `.logits` and
            `.past_key_values`. In eval mode, with autocast as wanted.
        prompts: token ids, none empty.
        seeds: one a prompt; an answer depends on its prompt and seed alone (up to rounding of the batch's arithmetic).
        end_ids: tokens that end an answer; the one that ended it is part of it.
        runs_full_length: make max_new_tokens calls even when every answer has ended: ranks that hold parts of one
            model wait for each other in every call.
    Returns:
        token ids of the answers, 1 to max_new_tokens each.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    uniforms = torch.stack([_uniforms(seed, max_new_tokens) for seed in seeds])
    uniforms = uniforms.to("cpu" if device.type == "mps" else device)  # MPS has no float64
    columns = iter(uniforms.unbind(1))
    made = decode(
        forward,
        ids,
        mask,
        lambda logits: _draw(logits, next(columns)),
        max_new_tokens=max_new_tokens,
        end_ids=() if runs_full_length else end_ids,
    )
    return [_cut(tokens, set(end_ids)) for tokens in made.tolist()]


def _cut(tokens: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first end token."""
    return tokens[: next((i for i, token in enumerate(tokens, start=1) if token in ends), len(tokens))]


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """(B,) tokens: the first whose cumulative probability exceeds its uniform number in [0, 1)."""
    cumulative = logits.to(uniform.device, torch.float64).softmax(-1).cumsum(-1)
    thresholds = uniform[:, None] * cumulative[:, -1:]  # the sum is 1 up to rounding
    tokens = torch.searchsorted(cumulative, thresholds, right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1).to(logits.device)


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
