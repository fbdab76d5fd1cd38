"""Entropy-adaptive fine-tuning: hold back where the model is sure of itself, learn where it is undecided."""

import math

import torch
from torch import Tensor

from psft.objectives.base import ObjectiveOutput
from psft.ops import check_choice, check_same_shape, masked_sum


def eaft_loss(
    logps: Tensor,
    topk_entropies: Tensor,
    completion_mask: Tensor,
    *,
    eaft_alpha: float = 1.0,
    eaft_scaling: str = "paper",
    eaft_top_k: int = 20,
    normalizer: Tensor | float,
) -> ObjectiveOutput:
    """EAFT: -(1/N) sum_t mask_t * sg((H_t / scale)^eaft_alpha) * logps_t, sg = no gradient through the weight.

    H_t is the entropy of the renormalised eaft_top_k most likely tokens (`psft.ops.TopKEntropy`).
    Source: arXiv:2601.02151 (K = 20, alpha = 1, scale = ln K, so that the weight lies in [0, 1]). LLaMA-Factory divides
    by 3.0 (ln 20 = 2.996), Axolotl's first version by nothing, which makes gradients three times larger.
    Gradient: -(H_t / scale)^eaft_alpha / N * d logps_t: a confident conflict, where the model is sure of another token,
    teaches little, and so does what it knows already.
    Singular points: H = 0 has weight 0 (1 for eaft_alpha = 0); rounding below 0 counts as 0. A counted token of
    probability 0 gives inf, or nan where its weight is 0; finite logits never do.

    Args:
        logps: (B, T) float, nats. log pi_theta(label). Carries the gradient.
        topk_entropies: (B, T) float, nats, in [0, ln eaft_top_k]. No gradient is taken through it.
        completion_mask: (B, T) bool, True = counts. Values elsewhere may be anything, -inf included.
        eaft_alpha: >= 0, dimensionless, finite; 0 = SFT, larger = sharper.
        eaft_scaling: "paper" (ln eaft_top_k nats), "llama_factory" (3.0 nats) or "axolotl" (1 nat).
        eaft_top_k: >= 2, tokens in `topk_entropies`; read here by the scaling "paper" only.
        normalizer: N >= 1, counted tokens of the whole optimizer step (all micro-batches, all ranks).
    Returns:
        loss: scalar in nats per token, graph kept even if no token counts. Not an NLL: watch that beside it.
        metrics: token_weight, the mean coefficient on the gradient of log p (SFT: 1).
    Raises:
        ValueError: the three tensors differ in shape, eaft_alpha is negative or infinite, eaft_top_k < 2, or no such
            eaft_scaling.
    """
    check_same_shape(logps=logps, topk_entropies=topk_entropies, completion_mask=completion_mask)
    check_choice(("paper", "llama_factory", "axolotl"), eaft_scaling=eaft_scaling)
    if not 0 <= eaft_alpha < math.inf:
        raise ValueError(f"must be at least 0 and finite: eaft_alpha={eaft_alpha}")
    if not eaft_top_k >= 2:
        raise ValueError(f"must be at least 2: eaft_top_k={eaft_top_k}")
    scale = {"paper": math.log(eaft_top_k), "llama_factory": 3.0, "axolotl": 1.0}[eaft_scaling]
    logps = torch.where(completion_mask, logps, 0.0)  # mask before the product: its gradient is 0 * weight, maybe nan
    weights = (topk_entropies.detach().clamp(min=0) / scale) ** eaft_alpha
    loss = -masked_sum(weights * logps, completion_mask) / normalizer
    return ObjectiveOutput(loss, {"token_weight": masked_sum(weights, completion_mask) / normalizer})
