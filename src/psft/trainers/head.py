"""Score target tokens inside the model's own forward, the LM head on trained positions only.

It lives in the forward, not beside it, so that what wraps the model (DDP, FSDP, PEFT, autocast) sees one ordinary call.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from psft.ops import IGNORE_INDEX, ReferenceLogits, VocabularyQuantity, token_statistics


@dataclass
class ScoredTokens(ModelOutput):
    """(B, T - 1) each, aligned with labels[:, 1:]; zero where `mask` is False.

    logps: nats, differentiable. entropies: nats. is_top1: bool. mask: bool, True = a trained token.
    quantities: vocabulary quantities by name, where they were asked for.
    """

    logps: Tensor = None  # type: ignore[assignment]
    entropies: Tensor = None  # type: ignore[assignment]
    is_top1: Tensor = None  # type: ignore[assignment]
    mask: Tensor = None  # type: ignore[assignment]
    quantities: dict[str, Tensor] = None  # type: ignore[assignment]


@dataclass
class ReferenceRows:
    """What gives a model's logits at the trained tokens of a micro-batch: hidden (N, H), head (V, H), bias (V,).

    No `ModelOutput`: accelerate would turn each of those, the whole head too, from half precision to float32.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def add_token_scoring(model: PreTrainedModel, quantities: tuple[VocabularyQuantity, ...] = ()) -> None:
    """Teach the model's forward two more calls; any other call is unchanged.

    model(**inputs, labels=labels, score_tokens=True) -> ScoredTokens, without `quantities`
    model(**inputs, labels=labels, score_tokens="quantities", reference=ReferenceLogits | None) -> with them
    model(**inputs, labels=labels, score_tokens="rows") -> ReferenceRows

    Args:
        model: causal language model, before any wrapping; under PEFT its base model.
        quantities: what an objective needs of each trained token's whole row of logits.
    """
    original_forward = model.forward
    logit_scale, softcap = logit_transform(model)

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        score_tokens: bool | str = False,
        reference: ReferenceLogits | None = None,
        **kwargs: Any,
    ) -> Any:
        if not score_tokens:
            return original_forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        shift_labels = labels[:, 1:]
        head = self.get_output_embeddings()
        weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (head.weight, head.bias))
        mask = shift_labels != IGNORE_INDEX
        rows, weight = _compute_dtype(hidden)[mask], _compute_dtype(weight)
        if score_tokens == "rows":
            if hasattr(head.weight, "ds_id"):  # DeepSpeed ZeRO-3 takes the head back at the end of this forward
                weight, bias = weight.clone(), None if bias is None else bias.clone()
            return ReferenceRows(hidden=rows, weight=weight, bias=bias)
        scored = token_statistics(
            rows, weight, shift_labels[mask], bias=bias, logit_scale=logit_scale, softcap=softcap,
            quantities=quantities if score_tokens == "quantities" else (), reference=reference,
        )  # fmt: skip

        def placed(values: Tensor) -> Tensor:
            # masked_scatter keeps the graph when no token counts, so such a micro-batch contributes a zero gradient
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return ScoredTokens(
            logps=placed(scored.logps),
            entropies=placed(scored.entropies),
            is_top1=placed(scored.is_top1),
            mask=mask,
            quantities={name: placed(values) for name, values in scored.quantities.items()},
        )

    model.forward = types.MethodType(forward, model)


def _compute_dtype(tensor: Tensor) -> Tensor:
    """On CUDA under autocast the head's products read half precision and return float32; elsewhere they are float32."""
    if tensor.is_cuda and torch.is_autocast_enabled("cuda"):
        return tensor.to(torch.get_autocast_dtype("cuda"))
    return tensor


def logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """Factor and soft cap a model applies to its logits, by the names its configuration uses for them."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), softcap
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0, softcap
    multiplies = config.model_type == "hyperclovax"  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    return float(scaling) if multiplies else 1.0 / scaling, softcap
