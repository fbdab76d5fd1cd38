"""Proximal SFT: PPO's clipped surrogate on demonstrations, with advantage 1 and an old policy that moves."""

import math

import torch
from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import MAX_LOG_RATIO, check_positive, check_same_shape, masked_sum


def psft_loss(
    logps: Tensor,
    old_logps: Tensor,
    completion_mask: Tensor,
    *,
    epsilon_high: float = 0.28,
    normalizer: Tensor | float,
) -> ObjectiveOutput:
    """Proximal SFT: -(1/N) sum_t mask_t * min(r_t, 1 + epsilon_high), with r_t = exp(logps_t - old_logps_t).

    Source: Zhu et al., "Proximal Supervised Fine-Tuning", arXiv:2508.17784 (clipped surrogate with advantage +1).
    With a constant positive advantage the lower bound never acts, so there is no `epsilon_low` here.
    Gradient: -r_t/N * d logps_t where r_t <= 1 + epsilon_high, zero beyond. At r = 1 it is exactly the SFT gradient.
    Singular points: a kink at r = 1 + epsilon_high, which still has the gradient of the inside. A bound above
    e^MAX_LOG_RATIO = 4.9e8, infinity included, is held there: r itself would overflow.

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        old_logps: (B, T) float, nats, no gradient. Same labels under the policy at window start.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        epsilon_high: > 0, dimensionless; `inf` = no clipping. Reference recipe: 0.28.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar, graph kept even if no token counts. Near -1 by construction: watch the NLL, not this.
        metrics: clip_fraction, the share of counted tokens whose gradient the clip removed; clippable_fraction, the
            share that it could remove at all: old probability below 1 / (1 + epsilon_high), as none grows beyond 1;
            token_weight, the mean coefficient on the gradient of log p (SFT: 1).
    Raises:
        ValueError: the three tensors differ in shape, or epsilon_high <= 0.
    """
    check_same_shape(logps=logps, old_logps=old_logps, completion_mask=completion_mask)
    check_positive(epsilon_high=epsilon_high)
    log_bound = min(math.log1p(epsilon_high), MAX_LOG_RATIO)
    log_ratio = torch.where(completion_mask, logps - old_logps, 0.0)  # mask before exp: padding may hold -inf
    ratio = log_ratio.clamp(max=log_bound).exp()  # clip in log space: exp(200) would be inf forward, nan backward
    clipped = completion_mask & (log_ratio > log_bound)
    clippable = completion_mask & (old_logps < -log_bound)
    metrics = {
        "clip_fraction": clipped.sum() / normalizer,
        "clippable_fraction": clippable.sum() / normalizer,
        "token_weight": masked_sum(ratio.detach(), completion_mask & ~clipped) / normalizer,
    }
    return ObjectiveOutput(-masked_sum(ratio, completion_mask) / normalizer, metrics)
