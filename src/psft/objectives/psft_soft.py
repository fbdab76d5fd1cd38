"""Proximal SFT with a soft bound: the gradient fades with the ratio (SAPO), or is scaled down throughout (PSPO)."""

import torch
from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import MAX_LOG_RATIO, check_positive, check_same_shape, masked_sum


def psft_soft_loss(
    logps: Tensor,
    old_logps: Tensor,
    completion_mask: Tensor,
    *,
    soft_temperature: float = 1.0,
    normalizer: Tensor | float,
) -> ObjectiveOutput:
    """Sigmoid gate: -(1/N) sum_t mask_t * (4 / tau) sigmoid(tau (r_t - 1)), with r_t = exp(logps_t - old_logps_t).

    Source: SAPO, arXiv:2511.20347, at advantage +1 (TRL: `sapo_temperature_pos`, 1.0 by default).
    Gradient: -(1/N) 4 s_t (1 - s_t) r_t * d logps_t with s_t = sigmoid(tau (r_t - 1)). At r = 1 it is exactly the SFT
    gradient, and it first grows beyond: at tau = 1 to 1.57 times at r = 2.06, below 1 again only from r = 3.47 on; at
    tau = 10 to 1.01 times. For large ratios it fades as r exp(-tau r), never quite to 0; for tau -> 0 it is r.
    Singular points: none. Where log r > MAX_LOG_RATIO, r is held (no gradient): there s is 1 to the last digit unless
    tau is below about 1e-7.

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        old_logps: (B, T) float, nats, no gradient. Same labels under the policy at window start.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        soft_temperature: tau > 0, dimensionless, finite; larger = a tighter gate.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar, graph kept even if no token counts; -2 / tau where nothing has moved. Watch the NLL, not this.
        metrics: token_weight, the mean coefficient on the gradient of log p (SFT: 1).
    Raises:
        ValueError: the three tensors differ in shape, or soft_temperature <= 0.
    """
    check_same_shape(logps=logps, old_logps=old_logps, completion_mask=completion_mask)
    check_positive(soft_temperature=soft_temperature)
    ratio, is_held = _held_ratio(logps, old_logps, completion_mask)
    gate = torch.sigmoid(soft_temperature * (ratio - 1))
    with torch.no_grad():
        closing = torch.sigmoid(-soft_temperature * (ratio - 1))  # 1 - gate, without its cancellation
        weight = masked_sum(4 * gate * closing * ratio, completion_mask & ~is_held)
    loss = -masked_sum(gate, completion_mask) * (4 / soft_temperature) / normalizer
    return ObjectiveOutput(loss, {"token_weight": weight / normalizer})


def psft_smoothed_loss(
    logps: Tensor,
    old_logps: Tensor,
    completion_mask: Tensor,
    *,
    soft_alpha: float = 0.1,
    normalizer: Tensor | float,
) -> ObjectiveOutput:
    """Smoothed ratio: -(1/N) sum_t mask_t * ((1 - soft_alpha) r_t + soft_alpha), with r_t = exp(logps_t - old_logps_t).

    Source: PSPO, arXiv:2509.21282 (TRL pull request 4548, alpha 0.1): the policy is mixed with the old one, no clip.
    Gradient: -(1 - soft_alpha) r_t / N * d logps_t: PSFT's without a clip, scaled by 1 - soft_alpha everywhere. At
    r = 1 it is (1 - soft_alpha) times the SFT gradient. With advantage +1 nothing here stops a ratio from growing.
    Singular points: none. Where log r > MAX_LOG_RATIO, r is held (no gradient).

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        old_logps: (B, T) float, nats, no gradient. Same labels under the policy at window start.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        soft_alpha: in [0, 1), the old policy's share of the mixture; 0 = PSFT without a clip.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar, graph kept even if no token counts. Near -1 by construction: watch the NLL, not this.
        metrics: token_weight, the mean coefficient on the gradient of log p (SFT: 1).
    Raises:
        ValueError: the three tensors differ in shape, or soft_alpha lies outside [0, 1).
    """
    check_same_shape(logps=logps, old_logps=old_logps, completion_mask=completion_mask)
    if not 0 <= soft_alpha < 1:
        raise ValueError(f"must be at least 0 and below 1: soft_alpha={soft_alpha}")
    ratio, is_held = _held_ratio(logps, old_logps, completion_mask)
    weight = (1 - soft_alpha) * masked_sum(ratio.detach(), completion_mask & ~is_held)
    loss = -masked_sum((1 - soft_alpha) * ratio + soft_alpha, completion_mask) / normalizer
    return ObjectiveOutput(loss, {"token_weight": weight / normalizer})


def _held_ratio(logps: Tensor, old_logps: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logps - old_logps), 1 behind the mask and at most e^MAX_LOG_RATIO; and where that bound holds it."""
    log_ratio = torch.where(completion_mask, logps - old_logps, 0.0)  # mask before exp: padding may hold -inf
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp(), log_ratio > MAX_LOG_RATIO  # exp(200): inf forward, nan backward
