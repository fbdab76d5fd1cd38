"""GEM: raise the target against the alternatives the model itself weighs, which keeps its distribution wide."""

from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import check_same_shape, masked_sum


def gem_loss(gem_gaps: Tensor, completion_mask: Tensor, *, normalizer: Tensor | float) -> ObjectiveOutput:
    """GEM: -(1/N) sum_t mask_t * gem_gap_t, with gem_gap_t = sum_v a_tv (log p_t(y_t) - log p_t(v)).

    a_tv = sg(softmax(z_t / gem_beta))_v, times sg(sigmoid(0.01 (z_tv - z_ty))) for gem_weighting = "logsigmoid": those
    settings belong to the vocabulary quantity, `psft.ops.GemGap`, whose values come in here. sg = no gradient.
    Source: Li et al., arXiv:2408.16673 (liziniu/GEM).
    Gradient: -1/N * d gem_gap_t for every counted token; in logits S onehot(y) - a with S = sum_v a_v, which is largest
    where the alternatives are likely and fades as the target takes over.
    Singular points: none for finite logits.

    Args:
        gem_gaps: (B, T) float, nats. Carries the gradient; negative where alternatives are likelier than the target.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar in nats per token, graph kept even if no token counts; unbounded below, so no NLL. metrics: none.
    Raises:
        ValueError: the tensors differ in shape.
    """
    check_same_shape(gem_gaps=gem_gaps, completion_mask=completion_mask)
    return ObjectiveOutput(-masked_sum(gem_gaps, completion_mask) / normalizer, {})
