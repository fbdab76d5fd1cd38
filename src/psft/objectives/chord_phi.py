"""CHORD's token weight alone: learn most from tokens the model is undecided about."""

import torch
from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import check_same_shape, masked_sum


def chord_phi_loss(logps: Tensor, completion_mask: Tensor, *, normalizer: Tensor | float) -> ObjectiveOutput:
    """CHORD-phi: -(1/N) sum_t mask_t * sg(p_t (1 - p_t)) * logps_t, with p_t = exp(logps_t), sg = no gradient.

    Source: CHORD, arXiv:2508.11408 (ms-swift `compute_chord_loss`). This is its expert-data term only: the paper mixes
    it, (1 - mu) * GRPO + mu * this, with mu on a schedule; there is no reinforcement learning term here.
    Gradient: -p_t (1 - p_t)/N * d logps_t, a quarter of SFT's at most (p = 1/2), none at p = 0 and p = 1. Gradients are
    small by construction: a learning rate tuned for SFT does not carry over.
    Singular points: a counted token of probability 0 gives nan (0 * -inf); finite logits never do.

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar in nats per token, graph kept even if no token counts. It falls at both ends, p -> 1 and p -> 0:
            watch the NLL, not this.
        metrics: token_weight, the mean coefficient on the gradient of log p (SFT: 1), here the mean of p (1 - p).
    Raises:
        ValueError: the tensors differ in shape.
    """
    check_same_shape(logps=logps, completion_mask=completion_mask)
    logps = torch.where(completion_mask, logps, 0.0)  # mask before the product: its gradient is 0 * weight, maybe nan
    with torch.no_grad():
        weights = logps.exp() * -torch.expm1(logps)  # 1 - p as -expm1: no cancellation where p is nearly 1
    loss = -masked_sum(weights * logps, completion_mask) / normalizer
    return ObjectiveOutput(loss, {"token_weight": masked_sum(weights, completion_mask) / normalizer})
