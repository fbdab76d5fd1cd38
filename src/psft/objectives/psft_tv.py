"""Proximal SFT with its trust region on the probability difference (total variation) instead of the ratio."""

import torch
from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import MAX_LOG_RATIO, check_positive, check_same_shape, masked_sum


def psft_tv_loss(
    logps: Tensor,
    old_logps: Tensor,
    completion_mask: Tensor,
    *,
    tv_delta: float = 0.2,
    normalizer: Tensor | float,
) -> ObjectiveOutput:
    """PSFT-TV: -(1/N) sum_t mask_t * min(r_t, 1 + tv_delta / p_old_t), with r_t = exp(logps_t - old_logps_t).

    Source: DPPO's total-variation mask at advantage +1 (verl 0.9.1 `core_algos.py`, `dppo_tv`; prime-rl, delta 0.2).
    There a stop-gradient ratio times log p is masked out where p - p_old > delta: another value, the same gradient.
    Gradient: -r_t/N * d logps_t where p_t - p_old_t <= tv_delta, zero beyond. At r = 1 it is exactly the SFT gradient.
    Against PSFT's ratio: a token that was already likely can reach this bound too (0.7 -> 0.95), while one that was
    very unlikely may grow many times over (1e-6 -> 0.1 is free).
    Singular points: a kink at p - p_old = tv_delta, which still has the gradient of the inside. The ratio's bound grows
    without limit as p_old -> 0 and is held at e^MAX_LOG_RATIO = 4.9e8, also for tv_delta = inf.

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        old_logps: (B, T) float, nats, no gradient. Same labels under the policy at window start.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        tv_delta: > 0, a difference of probabilities; from 1 on (`inf` included) no probability can cross it.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar, graph kept even if no token counts. Near -1 by construction: watch the NLL, not this.
        metrics: clip_fraction, the share of counted tokens whose gradient the bound removed; clippable_fraction, the
            share that it could remove at all: old probability below 1 - tv_delta, as none grows beyond 1;
            token_weight, the mean coefficient on the gradient of log p (SFT: 1).
    Raises:
        ValueError: the three tensors differ in shape, or tv_delta <= 0.
    """
    check_same_shape(logps=logps, old_logps=old_logps, completion_mask=completion_mask)
    check_positive(tv_delta=tv_delta)
    log_ratio = torch.where(completion_mask, logps - old_logps, 0.0)  # mask before exp: padding may hold -inf
    old = torch.where(completion_mask, old_logps, 0.0)
    log_bound = torch.log1p(tv_delta * torch.exp(-old)).clamp(max=MAX_LOG_RATIO)  # may be inf before the clamp
    ratio = log_ratio.clamp(max=log_bound).exp()  # in log space; `torch.minimum` would halve the gradient at a tie
    clipped = completion_mask & (log_ratio > log_bound)
    clippable = completion_mask & (old < -log_bound)
    metrics = {
        "clip_fraction": clipped.sum() / normalizer,
        "clippable_fraction": clippable.sum() / normalizer,
        "token_weight": masked_sum(ratio.detach(), completion_mask & ~clipped) / normalizer,
    }
    return ObjectiveOutput(-masked_sum(ratio, completion_mask) / normalizer, metrics)
