"""Plain supervised fine-tuning: the negative log-likelihood of the demonstration."""

from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import check_same_shape, masked_sum


def sft_loss(logps: Tensor, completion_mask: Tensor, *, normalizer: Tensor | float) -> ObjectiveOutput:
    """SFT: -(1/N) sum_t mask_t * logps_t.

    Source: eq. 1 of Zhu et al., "Proximal Supervised Fine-Tuning", arXiv:2508.17784; the usual cross-entropy.
    Gradient: -1/N * d logps_t for every counted token, whatever its probability.
    Singular points: none, short of a counted token of probability 0 (loss inf).

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar in nats per token, graph kept even if no token counts. metrics: none.
    Raises:
        ValueError: the tensors differ in shape.
    """
    check_same_shape(logps=logps, completion_mask=completion_mask)
    return ObjectiveOutput(-masked_sum(logps, completion_mask) / normalizer, {})
