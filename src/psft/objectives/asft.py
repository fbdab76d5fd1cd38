"""Anchored SFT: DFT's weighted likelihood, tied to a frozen reference by a KL over the whole vocabulary."""

import torch
from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import check_choice, check_same_shape, masked_sum


def asft_loss(
    logps: Tensor,
    ref_kls: Tensor,
    completion_mask: Tensor,
    *,
    kl_coef: float = 0.1,
    kl_direction: str = "forward",
    normalizer: Tensor | float,
) -> ObjectiveOutput:
    """ASFT: (1/N) sum_t mask_t * (-sg(p_t) * logps_t + kl_coef * KL_t), with p_t = exp(logps_t), sg = no gradient.

    Source: arXiv:2509.23753 (lambda 0.1; its official code takes the forward KL(ref || policy)).
    Gradient: -p_t/N * d logps_t, DFT's, plus kl_coef/N * d KL_t. Forward: towards all that the reference finds likely;
    reverse: away from what it finds unlikely. In logits p - p_ref, or p (log(p / p_ref) - KL).
    Singular points: a counted token of probability 0 gives nan (0 * -inf); finite logits never do.

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        ref_kls: (B, T) float, nats, >= 0. Full-vocabulary KL between policy and frozen reference at each position, in
            the direction `kl_direction` (`psft.ops.RefKl`). Carries its own gradient.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        kl_coef: lambda >= 0, dimensionless, finite; 0 = DFT.
        kl_direction: "forward", KL(ref || policy), or "reverse", KL(policy || ref). It names the metric; what is in
            `ref_kls` has been computed so already.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar in nats per token, graph kept even if no token counts. Not an NLL: watch that beside it.
        metrics: token_weight, the mean coefficient on the gradient of log p (SFT: 1), here the mean probability;
            kl_ref_{kl_direction}_full, the mean of `ref_kls` in nats.
    Raises:
        ValueError: the three tensors differ in shape, kl_coef is negative or infinite, or no such kl_direction.
    """
    check_same_shape(logps=logps, ref_kls=ref_kls, completion_mask=completion_mask)
    check_choice(("forward", "reverse"), kl_direction=kl_direction)
    if not 0 <= kl_coef < float("inf"):
        raise ValueError(f"must be at least 0 and finite: kl_coef={kl_coef}")
    logps = torch.where(completion_mask, logps, 0.0)  # mask before the product: its gradient is 0 * weight, maybe nan
    probs = logps.detach().exp()
    loss = masked_sum(kl_coef * ref_kls - probs * logps, completion_mask) / normalizer
    metrics = {
        "token_weight": masked_sum(probs, completion_mask) / normalizer,
        f"kl_ref_{kl_direction}_full": masked_sum(ref_kls.detach(), completion_mask) / normalizer,
    }
    return ObjectiveOutput(loss, metrics)
