"""SFT with a penalty for leaving a frozen reference: a full-vocabulary KL, or a target-token stand-in for one.

The two are different methods under one name. Only the first measures a KL.
"""

import torch
from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import MAX_LOG_RATIO, check_choice, check_same_shape, masked_sum


def sft_kl_loss(
    logps: Tensor,
    ref_kls: Tensor,
    completion_mask: Tensor,
    *,
    kl_coef: float = 0.5,
    kl_direction: str = "forward",
    normalizer: Tensor | float,
) -> ObjectiveOutput:
    """SFT-KL, full: (1/N) sum_t mask_t * (-logps_t + kl_coef * KL_t), KL_t over the whole vocabulary.

    Source: the SFT-KL baseline of Zhu et al., arXiv:2508.17784 (coefficient 0.5), with the KL taken exactly as in the
    baseline of ASFT, arXiv:2509.23753 (forward, coefficient 0.1).
    Gradient: -1/N * d logps_t, SFT's, plus kl_coef/N * d KL_t. In logits: p - onehot(y), plus kl_coef times p - p_ref
    (forward) or p (log(p / p_ref) - KL) (reverse).
    Singular points: none, short of a counted token of probability 0 (loss inf).

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        ref_kls: (B, T) float, nats, >= 0. Full-vocabulary KL between policy and frozen reference at each position, in
            the direction `kl_direction` (`psft.ops.RefKl`). Carries its own gradient.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        kl_coef: >= 0, dimensionless, finite; 0 = SFT.
        kl_direction: "forward", KL(ref || policy), or "reverse", KL(policy || ref). It names the metric; what is in
            `ref_kls` has been computed so already.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar in nats per token, graph kept even if no token counts. Not an NLL: watch that beside it.
        metrics: kl_ref_{kl_direction}_full, the mean of `ref_kls` in nats.
    Raises:
        ValueError: the three tensors differ in shape, kl_coef is negative or infinite, or no such kl_direction.
    """
    check_same_shape(logps=logps, ref_kls=ref_kls, completion_mask=completion_mask)
    _check_settings(kl_coef, kl_direction)
    loss = masked_sum(kl_coef * ref_kls - logps, completion_mask) / normalizer
    kl = masked_sum(ref_kls.detach(), completion_mask) / normalizer
    return ObjectiveOutput(loss, {f"kl_ref_{kl_direction}_full": kl})


def sft_kl_target_loss(
    logps: Tensor,
    ref_logps: Tensor,
    completion_mask: Tensor,
    *,
    kl_coef: float = 0.5,
    kl_direction: str = "forward",
    kl_estimator: str = "k3",
    normalizer: Tensor | float,
) -> ObjectiveOutput:
    """SFT-KL, target token only: (1/N) sum_t mask_t * (-logps_t + kl_coef * k_t).

    k1 = -u, k2 = u^2 / 2, k3 = e^u - 1 - u, with u = ref_logps - logps for kl_direction = "reverse", KL(policy || ref),
    and u = logps - ref_logps for "forward", KL(ref || policy).
    Source: estimators of Schulman, "Approximating KL Divergence" (2020). The SFT-KL baseline of Zhu et al.,
    arXiv:2508.17784, is the reverse k3 with coefficient 0.5, in a fork of verl (which also holds k3 itself within 10).

    These are no KL here. The estimators average to one over tokens drawn from the policy (reverse) or the reference
    (forward); demonstration tokens were drawn from neither. What remains is a reweighting of SFT, by the gradient
    coefficient on log p, with p, q the probability of the target under policy and reference and c = kl_coef:

        k1  reverse: 1 - c                   forward: 1 + c
        k2  1 - c log(p / q), in both directions
        k3  reverse: (1 - c) + c q / p       forward: (1 + c) - c p / q

    (d/dlogp of -logp + c k3 is -1 + c (1 - q / p) in reverse, -1 + c (p / q - 1) forward.) The reverse k3's coefficient
    is never negative for c <= 1, whatever p: no token is held near the reference, SFT is only rescaled, by 1 at p = q,
    down to 1 - c for p >> q, without bound for p << q. The reverse k1 is SFT times 1 - c. The forward k3 does turn, at
    p / q = 1 + 1 / c, and k2 at p / q = e^(1 / c): beyond, the token is pushed back.

    Gradient: -coefficient/N * d logps_t, as above.
    Singular points: where u > MAX_LOG_RATIO the exponential of k3 is held, so that only its linear part has a gradient
    (reverse: 1 - c, forward: 1 + c). A counted token of probability 0 has no finite loss; finite logits never give one.

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient, through k as well.
        ref_logps: (B, T) float, nats, no gradient. Same labels under the frozen reference.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        kl_coef: c >= 0, dimensionless, finite; 0 = SFT.
        kl_direction: "forward" or "reverse", as above.
        kl_estimator: "k1", "k2" or "k3". The full-vocabulary KL is `sft_kl_loss`.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar in nats per token, graph kept even if no token counts. Not an NLL: watch that beside it.
        metrics: kl_ref_{kl_direction}_{kl_estimator}, the mean of k in nats; token_weight, the mean coefficient on the
            gradient of log p (SFT: 1).
    Raises:
        ValueError: the three tensors differ in shape, kl_coef is negative or infinite, or no such kl_direction or
            kl_estimator.
    """
    check_same_shape(logps=logps, ref_logps=ref_logps, completion_mask=completion_mask)
    _check_settings(kl_coef, kl_direction)
    check_choice(("k1", "k2", "k3"), kl_estimator=kl_estimator)
    sign = 1 if kl_direction == "forward" else -1  # du / dlogps
    u = sign * torch.where(completion_mask, logps - ref_logps, 0.0)  # mask before exp: padding may hold -inf
    growth = torch.expm1(u.clamp(max=MAX_LOG_RATIO))  # e^u - 1: no cancellation near u = 0, no overflow
    k = {"k1": -u, "k2": u.square() / 2, "k3": growth - u}[kl_estimator]
    with torch.no_grad():
        held_growth = torch.where(u > MAX_LOG_RATIO, -1.0, growth)
        slope = {"k1": -torch.ones_like(u), "k2": u, "k3": held_growth}[kl_estimator]  # dk / du
        weight = masked_sum(1 - kl_coef * sign * slope, completion_mask)
    metrics = {
        f"kl_ref_{kl_direction}_{kl_estimator}": masked_sum(k.detach(), completion_mask) / normalizer,
        "token_weight": weight / normalizer,
    }
    return ObjectiveOutput(masked_sum(kl_coef * k - logps, completion_mask) / normalizer, metrics)


def _check_settings(kl_coef: float, kl_direction: str) -> None:
    check_choice(("forward", "reverse"), kl_direction=kl_direction)
    if not 0 <= kl_coef < float("inf"):
        raise ValueError(f"must be at least 0 and finite: kl_coef={kl_coef}")
