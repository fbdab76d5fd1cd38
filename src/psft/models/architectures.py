"""Sizes of known models, for counting before anything is downloaded. Imports no torch and needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psft.errors import RequestError


@dataclass(frozen=True)
class Architecture:
    """A dense decoder of the Llama shape: grouped-query attention, gated MLP, RMSNorm, rotary positions.

    context: positions the model was made for, in tokens. has_qkv_bias: Qwen2. has_qk_norm: Qwen3.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    is_tied: bool
    context: int
    has_qkv_bias: bool = False
    has_qk_norm: bool = False

    @property
    def num_parameters(self) -> int:
        """All trainable numbers; a tied embedding counts once."""
        return self.num_embedding_parameters * (1 if self.is_tied else 2) + self.num_body_parameters

    @property
    def num_embedding_parameters(self) -> int:
        """One table of vocab_size x hidden_size: the input embedding, and again the head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_body_parameters(self) -> int:
        """Everything between input embedding and head."""
        hidden, head = self.hidden_size, self.head_size
        query, key_value = self.num_heads * head, self.num_kv_heads * head
        attention = 2 * hidden * query + 2 * hidden * key_value
        attention += (query + 2 * key_value) * self.has_qkv_bias + 2 * head * self.has_qk_norm
        layer = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        return self.num_layers * layer + hidden

    @property
    def num_matmul_parameters(self) -> int:
        """N of "6 N operations per token": body and head; looking up an embedding multiplies nothing."""
        return self.num_body_parameters + self.num_embedding_parameters


def _llama(
    layers: int, hidden: int, inner: int, heads: int, kv: int, vocab: int, tied: bool, context: int
) -> Architecture:
    return Architecture(layers, hidden, inner, heads, kv, hidden // heads, vocab, tied, context)


def _qwen2(layers: int, hidden: int, inner: int, heads: int, kv: int, vocab: int, tied: bool) -> Architecture:
    return Architecture(layers, hidden, inner, heads, kv, hidden // heads, vocab, tied, 32768, has_qkv_bias=True)


def _qwen3(layers: int, hidden: int, inner: int, heads: int, tied: bool, context: int) -> Architecture:
    return Architecture(layers, hidden, inner, heads, 8, 128, 151936, tied, context, has_qk_norm=True)


# Source of every row: config.json of the hub model named.
KNOWN: dict[str, Architecture] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2(24, 896, 4864, 14, 2, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2(28, 1536, 8960, 12, 2, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen2(36, 2048, 11008, 16, 2, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen2(28, 3584, 18944, 28, 4, 152064, False),
    "meta-llama/Llama-3.2-1B-Instruct": _llama(16, 2048, 8192, 32, 8, 128256, True, 131072),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(32, 4096, 14336, 32, 8, 128256, False, 131072),
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, True, 40960),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, True, 40960),
    "Qwen/Qwen3-4B-Base": _qwen3(36, 2560, 9728, 32, True, 32768),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 12288, 32, False, 40960),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(30, 576, 1536, 9, 3, 49152, True, 8192),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _llama(32, 960, 2560, 15, 5, 49152, True, 8192),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llama(24, 2048, 8192, 32, 32, 49152, True, 8192),
}
KNOWN["smollm2-135m-instruct"] = KNOWN["HuggingFaceTB/SmolLM2-135M-Instruct"]

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # of the shape that Architecture describes


def find_architecture(name: str, revision: str = "main") -> Architecture | None:
    """The sizes of a model by hub id, quick-start name or local folder; None if unknown. Fetches nothing.

    Raises:
        RequestError: a local config.json that cannot be read.
    """
    if name in KNOWN:
        return KNOWN[name]
    from psft.models.resolve import local_folder

    folder = local_folder(name, revision)
    return from_config(folder) if folder is not None and (folder / "config.json").is_file() else None


def from_config(path: Path | str) -> Architecture | None:
    """The sizes in a config.json (or in the folder that holds one); None for a model of another shape.

    Raises:
        RequestError: no such file, no JSON, or a size is missing.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        return from_settings(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{path} gives no model sizes ({type(error).__name__}: {error}); save the model again"
        ) from error


def from_settings(config: Mapping[str, Any]) -> Architecture | None:
    """The sizes among a model's settings, as config.json names them; None for a model of another shape.

    Raises:
        KeyError: a size is missing.
    """
    if config.get("model_type") not in _MODEL_TYPES or config.get("num_experts"):
        return None
    hidden, heads, model_type = config["hidden_size"], config["num_attention_heads"], config["model_type"]
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or (128 if model_type == "qwen3" else hidden // heads),
        vocab_size=config["vocab_size"],
        is_tied=bool(config.get("tie_word_embeddings", model_type == "smollm3")),
        context=config["max_position_embeddings"],
        has_qkv_bias=model_type == "qwen2",
        has_qk_norm=model_type == "qwen3",
    )
