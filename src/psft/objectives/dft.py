"""Dynamic fine-tuning: each token's likelihood gradient weighted by the probability the model already gives it."""

import torch
from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import check_same_shape, masked_sum


def dft_loss(logps: Tensor, completion_mask: Tensor, *, normalizer: Tensor | float) -> ObjectiveOutput:
    """DFT: -(1/N) sum_t mask_t * sg(p_t) * logps_t, with p_t = exp(logps_t) and sg = no gradient through it.

    Source: Wu et al., arXiv:2508.05629.
    Gradient: -p_t/N * d logps_t = -1/N * d p_t: it raises the probability itself, so what the model finds unlikely
    hardly moves. At p = 1 it is the SFT gradient.
    Singular points: a counted token of probability 0 gives nan (0 * -inf); finite logits never do.

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar in nats per token, graph kept even if no token counts. It falls at both ends, p -> 1 and p -> 0
            (-p log p is largest at p = 1/e): watch the NLL, not this.
        metrics: token_weight, the mean coefficient on the gradient of log p (SFT: 1), here the mean probability.
    Raises:
        ValueError: the tensors differ in shape.
    """
    check_same_shape(logps=logps, completion_mask=completion_mask)
    logps = torch.where(completion_mask, logps, 0.0)  # mask before the product: its gradient is 0 * weight, maybe nan
    probs = logps.detach().exp()
    loss = -masked_sum(probs * logps, completion_mask) / normalizer
    return ObjectiveOutput(loss, {"token_weight": masked_sum(probs, completion_mask) / normalizer})
