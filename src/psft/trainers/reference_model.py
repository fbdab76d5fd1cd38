"""Which model is the frozen reference, and what cannot be one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from psft.errors import RequestError
from psft.models import load_model

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer

logger = logging.getLogger(__name__)


def reference_model(trainer: PSFTTrainer, ref_model: Any, *, needs_scores: bool, needs_vocabulary: bool) -> Any:
    """A model of its own, or None where the policy itself serves: see `FrozenReference`.

    Args:
        ref_model: what the user gave the trainer.
        needs_scores: whether it has to score the training set before the first update.
        needs_vocabulary: whether it has to run beside the policy.
    Raises:
        RequestError: another vocabulary, or a policy that can be neither copied nor taken back to where it was.
    """
    args, policy = trainer.args, trainer.model
    if args.ref_model_name_or_path is not None:
        is_bf16 = args.force_pure_bf16 and policy.dtype == torch.bfloat16
        ref_model = load_model(
            args.ref_model_name_or_path,
            dtype="bfloat16" if is_bf16 else "float32",
            force_pure_bf16=args.force_pure_bf16,
            attn_implementation=policy.config._attn_implementation,
            revision=args.ref_model_revision,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
        )
    if ref_model is not None:
        _check_given(ref_model, policy)
        return _without_precision(ref_model)
    if is_peft_model(policy):
        if needs_scores or needs_vocabulary:
            _check_adapter(policy)
        return None
    return _copy_of(policy) if needs_vocabulary else None


def base_of(model: Any) -> Any:
    """The model inside a PEFT model, else the model."""
    return model.get_base_model() if is_peft_model(model) else model


def base_state(policy: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a PEFT model's state dict that are the base model's, by the names they have there."""
    adapters = tuple(prefix.replace("_fsdp_wrapped_module.", "") for prefix in _adapter_prefixes(policy))
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in state.items()
        if not name.startswith(adapters)
    }


def _adapter_prefixes(policy: Any) -> Iterator[str]:
    """What the names of a PEFT model's adapter weights begin with; all others are the base model's."""
    for name, module in policy.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            for part in getattr(module, "adapter_layer_names", ()):
                yield f"{name}.{part}."


def _check_adapter(policy: Any) -> None:
    """Refuse a PEFT policy that trains more than adapters; warn where its adapter is not new."""
    adapters = tuple(_adapter_prefixes(policy))
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and not name.startswith(adapters):
            raise RequestError(
                f"'{name}' is trained but belongs to no adapter (LoRA with bias other than 'none' does this), so "
                "switching the adapter off does not give the initial model back. Train adapters alone, or name the "
                "reference with ref_model_name_or_path."
            )
    starts_at_zero = ("lora_B", "lora_embedding_B")
    if any(bool(p.any()) for name, p in policy.named_parameters() if any(part in name for part in starts_at_zero)):
        logger.warning(
            "the adapter is not zero at the start: the reference is the model without it, not the model as it is now. "
            "To start from the latter, merge the adapter before training, or give a merged copy as ref_model."
        )


def _check_given(ref_model: Any, policy: Any) -> None:
    if not isinstance(ref_model, nn.Module):
        raise RequestError(
            f"ref_model is a {type(ref_model).__name__}; give a model, or name one with ref_model_name_or_path."
        )
    if base_of(ref_model) is base_of(policy):
        raise RequestError(
            "ref_model is the model that is trained, so it would not stay frozen. Leave ref_model out: the reference "
            "is then the model as it is now."
        )
    if _num_words(ref_model) != _num_words(policy):
        raise RequestError(
            f"the reference has a vocabulary of {_num_words(ref_model)} tokens, the trained model one of "
            f"{_num_words(policy)}. Use a reference with the same tokenizer."
        )


def _num_words(model: Any) -> int:
    weight = base_of(model).get_output_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 leaves an empty tensor and its shape


def _copy_of(policy: Any) -> Any:
    """A copy of the model for the whole run, or `RequestError` where there is nothing whole to copy."""
    cause = None
    if is_deepspeed_zero3_enabled():
        cause = "DeepSpeed ZeRO-3 has cut up the model's weights"
    elif any(getattr(policy, name, False) for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")):
        cause = "the model's weights are quantised"
    if cause is not None:
        raise RequestError(
            f"{cause}, so no frozen copy can be made of it. Name the reference with ref_model_name_or_path."
        )
    return _without_precision(copy.deepcopy(policy))


def _without_precision(model: Any) -> Any:
    """The model without the autocast that an earlier trainer's accelerate has put around its forward."""
    model.forward = model.__dict__.pop("_original_forward", model.forward)
    model._is_accelerate_prepared = False
    return model
