"""Which attention a model is loaded with where the rows of a micro-batch are joined into one (`padding_free`).

Joined rows each start at position 0, and attention must not look from one into another. Kernels for rows of any
length (flash-attn, and PyTorch's own through `psft.models.varlen`) are told where each begins; flex_attention skips the
blocks between them; sdpa and eager mask a whole T x T square, which is right but slower than padding once a micro-batch
is long.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psft.errors import RequestError


@dataclass(frozen=True)
class _Candidate:
    """name: of transformers. package: what has to be installed. flags: of model classes that can use it.

    is_flash: flash-attn's kernels, which compute in half precision. capability: least one of a CUDA device.
    """

    name: str
    package: str
    flags: tuple[str, ...]
    is_flash: bool
    capability: tuple[int, int]


_CANDIDATES = (
    _Candidate("flash_attention_3", "flash-attn-3", ("_supports_flash_attn",), True, (9, 0)),
    _Candidate("flash_attention_2", "flash-attn", ("_supports_flash_attn",), True, (8, 0)),
    _Candidate("psft_varlen", "torch", ("_supports_sdpa", "_supports_attention_backend"), True, (8, 0)),
    _Candidate("flex_attention", "torch", ("_supports_flex_attn",), False, (7, 0)),
)
"""Best first. flex_attention is last: it compiles at every start, and builds a mask of blocks in every forward pass."""


@dataclass(frozen=True)
class ChosenAttention:
    """name: for `attn_implementation`; None leaves the choice to transformers. why: one line, or None."""

    name: str | None
    why: str | None = None


def choose_attention(
    requested: str | None,
    folder: Path | None,
    *,
    padding_free: bool,
    is_half: bool,
    device_type: str,
    trust_remote_code: bool = False,
) -> ChosenAttention:
    """What a model is to be loaded with. What a person asked for is never replaced.

    Kernels from the hub (`kernels-community/...`) are code that is fetched: they are used where they are asked for.

    Args:
        requested: `attn_implementation`, or None.
        folder: of the model, with its config.json; None if it is not at hand: then nothing is chosen yet.
        is_half: whether products are computed in half precision, by autocast or by the weights.
        device_type: "cpu", "cuda", ... where it will train.
    Raises:
        RequestError: the request cannot be trained on this device, or nothing that is installed fits.
    """
    if requested is not None:
        _check_requested(requested, is_half=is_half, device_type=device_type)
    if requested is not None or not padding_free or device_type != "cuda":
        return ChosenAttention(requested)
    if folder is None:
        return ChosenAttention(None, "padding_free: attention is chosen once the model is at hand")
    config, model_class = _model(folder, trust_remote_code=trust_remote_code)
    if model_class is None:
        return ChosenAttention(None, "padding_free: the model brings its own code, and its attention stays as it is")
    reasons = []
    for candidate in _CANDIDATES:
        problem = _problem(candidate, config, model_class, is_half=is_half)
        if problem is None:
            version = importlib.metadata.version(candidate.package)
            return ChosenAttention(
                candidate.name, f"padding_free: attention is {candidate.name} ({candidate.package} {version})"
            )
        reasons.append(f"{candidate.name}: {problem}")
    raise RequestError(
        f"padding_free=true has no fast attention here that keeps joined rows apart ({'; '.join(reasons)}). Install "
        "one (pip install flash-attn --no-build-isolation), ask for the slow one with attn_implementation=sdpa, or set "
        "padding_free=false."
    )


def _check_requested(requested: str, *, is_half: bool, device_type: str) -> None:
    """Raise `RequestError` for what cannot be trained here; transformers would say so later, or compute nonsense."""
    is_flash = "flash" in requested or requested == "psft_varlen"  # hub kernels too; flash_... is transformers' rule
    if device_type == "cpu" and (is_flash or requested.startswith("flex")):
        raise RequestError(
            f"attn_implementation={requested} cannot be trained on a CPU: flash-attn has no kernels there, and "
            "flex_attention no backward pass. Use sdpa or eager, or leave it out."
        )
    if is_flash and not is_half:
        raise RequestError(
            f"attn_implementation={requested} computes in half precision only, and bf16 and fp16 are off. Set "
            "bf16=true, or use sdpa."
        )


def _problem(candidate: _Candidate, config: Any, model_class: Any, *, is_half: bool) -> str | None:
    """Why it cannot be used, or None."""
    import torch

    if not _is_installed(candidate.name):
        return f"{candidate.package} is not installed, not for this device, or too old"
    if torch.cuda.get_device_capability() < candidate.capability:
        return "the device is too old for it"
    if not all(getattr(model_class, flag, False) for flag in candidate.flags):
        return f"{model_class.__name__} has no support for it"
    if candidate.is_flash and not is_half:
        return "it computes in half precision only, and bf16 is off"
    if candidate.is_flash and not _is_flash_size(config):
        return "it takes heads of at most 256 numbers, in multiples of 8"
    if candidate.name == "psft_varlen" and getattr(config, "attn_logit_softcapping", None) is not None:
        return "it has no soft-capped scores"
    return None


def _is_flash_size(config: Any) -> bool:
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return size % 8 == 0 and size <= 256


def _is_installed(name: str) -> bool:
    """Whether transformers can use it on this machine's CUDA device."""
    from transformers.utils import import_utils

    if name == "flash_attention_3":
        return bool(import_utils.is_flash_attn_3_available())
    if name == "flash_attention_2":
        return bool(import_utils.is_flash_attn_2_available())
    if name == "flex_attention":
        return bool(import_utils.is_torch_flex_attn_available())
    from psft.models.varlen import is_in_pytorch

    return is_in_pytorch()


def _model(folder: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """The text configuration of a model folder and its transformers class; None for one that brings its own."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return config.get_text_config(), MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
