"""Importance-weighted SFT: demonstrations count more the more the model has come to favour them over a reference."""

import torch
from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import check_positive, check_same_shape, masked_sum

MAX_SEQUENCE_WEIGHT = 16.0
TOKEN_WEIGHT_RANGE = (0.2, 1.8)


def iw_sft_loss(
    logps: Tensor,
    ref_logps: Tensor,
    sequence_ids: Tensor,
    completion_mask: Tensor,
    *,
    iw_temperature: float = 1.0,
    normalizer: Tensor | float,
) -> ObjectiveOutput:
    """iw-SFT, one weight a sequence: -(1/N) sum_t mask_t * sg(w_s(t)) * logps_t, sg = no gradient through the weight.

    w_s = clamp(exp(tau * mean over the counted tokens of sequence s of (logps - ref_logps)), 0, 16).
    Source: Qin and Springenberg, arXiv:2507.12856; clamp and mean as published (emmyqin/iw_sft, bounding_trainers.py).
    There a [B, T, 1] loss is multiplied by [B, 1] weights, which pairs tokens with their own sequence only for B = 1.
    Gradient: -w_s/N * d logps_t: every counted token of a sequence has the same coefficient. Where the policy is the
    reference it is the SFT gradient.
    Singular points: the weight stops growing at 16; below its only bound is 0. A counted token of probability 0 gives
    nan (0 * -inf); finite logits never do.

    A weight is the mean over the tokens that are here: a sequence must lie whole in one micro-batch.

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        ref_logps: (B, T) float, nats, no gradient. Same labels under the frozen reference.
        sequence_ids: (B, T) int64, >= 0, in any order. Which sequence a token belongs to: the row number in a padded
            batch, several numbers in a packed row.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        iw_temperature: tau > 0, dimensionless, finite; larger = weights further from 1.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar in nats per token, graph kept even if no token counts. Not an NLL: watch that beside it.
        metrics: token_weight, the mean coefficient on the gradient of log p (SFT: 1).
    Raises:
        ValueError: the four tensors differ in shape, or iw_temperature <= 0.
    """
    check_same_shape(logps=logps, ref_logps=ref_logps, sequence_ids=sequence_ids, completion_mask=completion_mask)
    check_positive(iw_temperature=iw_temperature)
    logps = torch.where(completion_mask, logps, 0.0)  # mask before the product: its gradient is 0 * weight, maybe nan
    with torch.no_grad():
        log_ratio = logps - torch.where(completion_mask, ref_logps, 0.0)
        weights = (iw_temperature * _sequence_means(log_ratio, sequence_ids, completion_mask)).exp()
        weights = weights.clamp(0.0, MAX_SEQUENCE_WEIGHT)  # an infinite exp is clamped too; no gradient runs through it
    loss = -masked_sum(weights * logps, completion_mask) / normalizer
    return ObjectiveOutput(loss, {"token_weight": masked_sum(weights, completion_mask) / normalizer})


def iw_sft_token_loss(
    logps: Tensor, ref_logps: Tensor, completion_mask: Tensor, *, normalizer: Tensor | float
) -> ObjectiveOutput:
    """iw-SFT, one weight a token: -(1/N) sum_t mask_t * sg(w_t) * logps_t, sg = no gradient through the weight.

    w_t = clamp(exp(logps_t - ref_logps_t), 0.2, 1.8).
    Source: Qin and Springenberg, arXiv:2507.12856; clamp as published (emmyqin/iw_sft, bounding_trainers.py).
    Gradient: -w_t/N * d logps_t. Where the policy is the reference it is the SFT gradient. Beyond the clamp a token
    keeps the coefficient of the bound (in PSFT it loses its gradient).
    Singular points: none, short of a counted token of probability 0 (loss inf).

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        ref_logps: (B, T) float, nats, no gradient. Same labels under the frozen reference.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar in nats per token, graph kept even if no token counts. Not an NLL: watch that beside it.
        metrics: token_weight, the mean coefficient on the gradient of log p (SFT: 1).
    Raises:
        ValueError: the three tensors differ in shape.
    """
    check_same_shape(logps=logps, ref_logps=ref_logps, completion_mask=completion_mask)
    logps = torch.where(completion_mask, logps, 0.0)  # mask before the product: its gradient is 0 * weight, maybe nan
    with torch.no_grad():
        log_ratio = logps - torch.where(completion_mask, ref_logps, 0.0)
        weights = log_ratio.exp().clamp(*TOKEN_WEIGHT_RANGE)  # an infinite exp is clamped too
    loss = -masked_sum(weights * logps, completion_mask) / normalizer
    return ObjectiveOutput(loss, {"token_weight": masked_sum(weights, completion_mask) / normalizer})


def _sequence_means(values: Tensor, sequence_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """(B, T): the mean of `values`, 0 behind the mask, over the counted tokens of each token's sequence."""
    # Ids of any size (padding's too) become places in a buffer as long as the tokens: an id's first place when sorted.
    # `unique` would do it too, but the host would wait for a device to tell how many there are.
    ids = sequence_ids.flatten().contiguous()
    dense_ids = torch.searchsorted(ids.sort()[0], ids)
    sums = values.new_zeros(values.numel()).index_add(0, dense_ids, values.flatten())
    counts = torch.zeros_like(sums).index_add(0, dense_ids, completion_mask.flatten().to(sums.dtype))
    return (sums / counts.clamp(min=1))[dense_ids].view_as(values)
