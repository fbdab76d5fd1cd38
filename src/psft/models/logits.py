"""What a model does to the product of hidden states and head before it is logits."""

from __future__ import annotations

from transformers import PreTrainedModel


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
