"""From a model's name to its folder, its tokenizer and its weights in the form that training needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from psft.errors import RequestError
from psft.models.quickstart import NAME as QUICKSTART_NAME
from psft.models.quickstart import resolve_quickstart

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_CONFIG_FILE = "adapter_config.json"
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
# Tokens that models carry for padding (Llama 3.1, Qwen, Mistral, Gemma) or can spare for it, best first.
_PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")

PURE_BF16_REASON = (
    "dtype=bfloat16 would keep the weights themselves in bf16, whose neighbouring values lie 0.4 to 0.8 % apart: at "
    "PSFT's learning rate of 1e-6 almost every AdamW update is smaller than half that spacing and is rounded away; "
    "keep --dtype float32 (bf16 autocast still computes in bf16), or add --force_pure_bf16 if this is what you want"
)


def resolve_model(name: str, revision: str = "main", on_progress: Callable[[str], None] | None = None) -> Path:
    """The local folder of a model with config and weights.

    Args:
        name: `smollm2-135m-instruct` (built in the cache on first use), a local folder, or a hub id.
        revision: branch, tag or commit of a hub model.
        on_progress: told in one line what takes long; default: a line on stderr.

    Raises:
        RequestError: no such folder, a folder without config or weights, or a hub model that cannot be fetched.
    """
    if name == QUICKSTART_NAME:
        return resolve_quickstart(on_progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(folder)
        return folder
    if folder.exists():
        raise RequestError(
            f"{name} is a file; --model_name_or_path takes a model folder, a hub id or {QUICKSTART_NAME}"
        )
    if not looks_like_hub_id(name):
        raise RequestError(
            f"no model folder at {name}, and it is no hub id (owner/name); check the path or use {QUICKSTART_NAME}"
        )
    return _fetch_from_hub(name, revision)


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` can be `owner/name` on the hub: two plain parts, none of them a path's `.`, `..` or `~`."""
    parts = name.split("/")
    return len(parts) == 2 and all(
        part and part[0].isalnum() and all(letter.isalnum() or letter in "-_." for letter in part) for part in parts
    )


def check_model_folder(folder: Path) -> None:
    """Raises RequestError naming what a model folder lacks: config.json, weights, or shards its index names."""
    if (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        raise RequestError(f"{folder} holds a LoRA adapter, not a model; merge it into its base model first")
    if not (folder / "config.json").is_file():
        raise RequestError(f"model folder {folder} has no config.json; point --model_name_or_path at a saved model")
    found = [file for file in WEIGHT_FILES if (folder / file).is_file()]
    if not found:
        raise RequestError(
            f"model folder {folder} has no weights (none of {', '.join(WEIGHT_FILES)}); save or copy the model again"
        )
    if not found[0].endswith(".index.json"):
        return
    try:
        shards = sorted(set(json.loads((folder / found[0]).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RequestError(f"{folder / found[0]} cannot be read ({error}); copy the model there again") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise RequestError(
            f"model folder {folder} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}; copy again"
        )


def local_folder(name: str, revision: str = "main") -> Path | None:
    """Where a model's config and tokenizer already lie on this machine, or None. Downloads and builds nothing."""
    from psft.models import quickstart

    if name == QUICKSTART_NAME:
        return quickstart.model_folder() if quickstart.is_built() else None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not looks_like_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def load_tokenizer(name: str, chat_template_path: str | None = None, revision: str = "main") -> PreTrainedTokenizerBase:
    """The model's tokenizer with a pad token, and with the chat template of a file if one is named.

    The pad token is the model's own, else a spare token it already has, else its end token; none is added, so the
    embedding keeps its size. A chat template file is Jinja text.

    Raises:
        RequestError: no tokenizer there, no end token, or an unreadable template file.
    """
    from transformers import AutoTokenizer

    folder = local_folder(name, revision) or resolve_model(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(
            f"{folder} has no usable tokenizer ({_first_line(error)}); save it beside the model"
        ) from error
    if tokenizer.eos_token is None:
        raise RequestError(f"the tokenizer of {name} has no end token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        spare = [token for token in _PAD_CANDIDATES if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    if chat_template_path is not None:
        try:
            tokenizer.chat_template = Path(chat_template_path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"chat template {chat_template_path} cannot be read: {_first_line(error)}") from error
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    force_pure_bf16: bool = False,
    attn_implementation: str | None = None,
    revision: str = "main",
) -> PreTrainedModel:
    """A causal language model on the CPU, its weights in `dtype`, as `transformers` loads it.

    Raises:
        RequestError: bfloat16 weights without `force_pure_bf16`, an unknown dtype, or a model that cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_dtype(dtype, force_pure_bf16=force_pure_bf16)
    folder = resolve_model(name, revision)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        if "out of memory" in str(error).lower():
            raise
        raise RequestError(f"the model in {folder} cannot be loaded: {_first_line(error)}") from error


def check_dtype(dtype: str, *, force_pure_bf16: bool = False) -> None:
    """Raises RequestError for a weight dtype that is unknown, or bfloat16 that nobody insisted on."""
    if dtype not in ("float32", "bfloat16"):
        raise RequestError(f"dtype={dtype} is not known; use float32 (default) or bfloat16")
    if dtype == "bfloat16" and not force_pure_bf16:
        raise RequestError(PURE_BF16_REASON)


def _fetch_from_hub(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_PATTERNS))
    except GatedRepoError as error:
        raise RequestError(f"{name} is gated; accept its licence on the hub and run `hf auth login`") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise RequestError(
            f"the hub has no model {name} at revision {revision}, or it is private; check it or run `hf auth login`"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"{name} is no local folder and cannot be fetched from the hub ({_first_line(error)}); "
            f"check the name and the network, or give a local folder or {QUICKSTART_NAME}"
        ) from error
    check_model_folder(folder)
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
