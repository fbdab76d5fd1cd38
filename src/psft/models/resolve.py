"""From a model's name to its folder, its tokenizer and its weights in the form that training needs.

A model folder may come from anywhere. Nothing of it is run unless the person asks for it: Python files that it names
(`auto_map`) only with `trust_remote_code`, weights in pickle form (`.bin`) only with `allow_pickle`; both are off, and
neither implies the other. Pickles are still read with `weights_only`, as transformers does by default.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psft.errors import RequestError, shown
from psft.models.quickstart import NAME as QUICKSTART_NAME
from psft.models.quickstart import resolve_quickstart

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_CONFIG_FILE = "adapter_config.json"
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
# Tokens that models carry for padding (Llama 3.1, Qwen, Mistral, Gemma) or can spare for it, best first.
_PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")

PURE_BF16_REASON = (
    "dtype=bfloat16 would keep the weights themselves in bf16, whose neighbouring values lie 0.4 to 0.8 % apart: at "
    "PSFT's learning rate of 1e-6 almost every AdamW update is smaller than half that spacing and is rounded away; "
    "keep --dtype float32 (bf16 autocast still computes in bf16), or add --force_pure_bf16 if this is what you want"
)


def resolve_model(
    name: str,
    revision: str = "main",
    on_progress: Callable[[str], None] | None = None,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """The local folder of a model with config and weights.

    Args:
        name: `smollm2-135m-instruct` (built in the cache on first use), a local folder, or a hub id.
        revision: branch, tag or commit of a hub model.
        on_progress: told in one line what takes long; default: a line on stderr.
        trust_remote_code, allow_pickle: see above.

    Raises:
        RequestError: no such folder, a folder without config or usable weights, one that wants its own code run, or a
            hub model that cannot be fetched.
    """
    if name == QUICKSTART_NAME:
        return resolve_quickstart(on_progress)
    folder = _existing(name)
    if folder is not None and folder.is_dir():
        check_model_folder(folder, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        return folder
    if folder is not None:
        raise RequestError(
            f"{shown(name)} is a file; --model_name_or_path takes a model folder, a hub id or {QUICKSTART_NAME}"
        )
    if not looks_like_hub_id(name):
        raise RequestError(
            f"no model folder at {shown(name)}, and it is no hub id (owner/name); check the path or use "
            f"{QUICKSTART_NAME}"
        )
    folder = _fetch_from_hub(name, revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    check_model_folder(folder, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    return folder


def _existing(name: str) -> Path | None:
    """The path of that name, if there is anything."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (ValueError, RuntimeError):  # NUL in the name; no such ~user
        return None
    except OSError as error:
        raise RequestError(
            f"{shown(name)} cannot be opened: {error.strerror}; check the path and its rights"
        ) from error


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` can be `owner/name` on the hub: two plain parts, none of them a path's `.`, `..` or `~`."""
    parts = name.split("/")
    return len(parts) == 2 and all(
        part and part[0].isalnum() and all(letter.isalnum() or letter in "-_." for letter in part) for part in parts
    )


def check_model_folder(folder: Path, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> None:
    """Raises RequestError naming what a model folder lacks, or holds that nobody allowed.

    It needs config.json, weights, and every shard that their index names. It must be no LoRA adapter, must not want its
    own code run unless `trust_remote_code`, and must have safetensors unless `allow_pickle`.
    """
    where = shown(folder)
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        raise RequestError(
            f"{where} holds a LoRA adapter ({ADAPTER_CONFIG_FILE}); merge it into its base model first and give that"
        )
    if not (folder / "config.json").is_file():
        raise RequestError(f"model folder {where} has no config.json; point --model_name_or_path at a saved model")
    if not trust_remote_code:
        _require_no_code(folder, "config.json")
    found = [file for file in WEIGHT_FILES if (folder / file).is_file()]
    pickles = [file for file in PICKLE_FILES if (folder / file).is_file()]
    if not found and pickles and not allow_pickle:
        raise RequestError(
            f"model folder {where} has its weights only as {pickles[0]}, a pickle, which can hold code; save them as "
            "safetensors (save_pretrained does), or pass --allow_pickle if you trust where they come from"
        )
    found = found or pickles
    if not found:
        raise RequestError(
            f"model folder {where} has no weights (none of {', '.join(WEIGHT_FILES)}); save or copy the model again"
        )
    if not found[0].endswith(".index.json"):
        return
    try:
        shards = sorted(set(_read_json(folder / found[0])["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise RequestError(
            f"{shown(folder / found[0])} cannot be read ({_first_line(error)}); copy the model there again"
        ) from error
    if missing:
        raise RequestError(
            f"model folder {where} lacks {len(missing)} of {len(shards)} weight files, first {shown(missing[0])}; copy "
            "again"
        )


def _require_no_code(folder: Path, file: str) -> None:
    """Raises RequestError if a config file names Python code, in `auto_map`, that loading it would run."""
    path = folder / file
    if not path.is_file():
        return
    try:
        content = _read_json(path)
        code = content.get("auto_map") if isinstance(content, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{shown(path)} cannot be read ({_first_line(error)}); copy the model there again"
        ) from error
    if code:
        names = ", ".join(map(str, code.values())) if isinstance(code, dict) else str(code)
        raise RequestError(
            f"{shown(path)} names Python code that loading it would run ({shown(names, 100)} in auto_map); read that "
            "code and pass --trust_remote_code if you trust it, or take auto_map out of a copy of the folder to use "
            "what transformers has for this model"
        )


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def local_folder(name: str, revision: str = "main") -> Path | None:
    """Where a model's config and tokenizer already lie on this machine, or None. Downloads and builds nothing."""
    from psft.models import quickstart

    if name == QUICKSTART_NAME:
        return quickstart.model_folder() if quickstart.is_built() else None
    folder = _existing(name)
    if folder is not None and folder.is_dir():
        return folder
    if not looks_like_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # a name that the hub does not allow
        return None
    return Path(config).parent if isinstance(config, str) else None


def load_tokenizer(
    name: str,
    chat_template_path: str | None = None,
    revision: str = "main",
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a pad token, and with the chat template of a file if one is named.

    The pad token is the model's own, else a spare token it already has, else its end token; none is added, so the
    embedding keeps its size. A chat template file is Jinja text.

    Raises:
        RequestError: no tokenizer there, one that wants its own code run, no end token, or an unreadable template file.
    """
    from transformers import AutoTokenizer

    folder = local_folder(name, revision)
    if folder is None:
        folder = resolve_model(name, revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if not trust_remote_code:
        _require_no_code(folder, "config.json")
        _require_no_code(folder, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=_config_for_tokenizer(folder), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises plain Exceptions for a damaged tokenizer.json
        raise RequestError(
            f"{shown(folder)} has no usable tokenizer ({_first_line(error)}); save it beside the model"
        ) from error
    if tokenizer.eos_token is None:
        raise RequestError(
            f"the tokenizer of {shown(name)} has no end token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        spare = [token for token in _PAD_CANDIDATES if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    if chat_template_path is not None:
        try:
            tokenizer.chat_template = Path(chat_template_path).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: no UTF-8, NUL in the name
            raise RequestError(
                f"chat template {shown(chat_template_path)} cannot be read: {_first_line(error)}; give a Jinja file"
            ) from error
    return tokenizer


def _config_for_tokenizer(folder: Path) -> PreTrainedConfig | None:
    """What `AutoTokenizer` asks a model's configuration for; None where it has to read the configuration itself.

    It asks for names: of the kind of model, of the tokenizer's class. To learn them it makes the model's own
    configuration, whose import brings in transformers' kernels, torch's compiler and sympy: 2 s of a processor. Where
    tokenizer_config.json names the class and no code of its own, the names in config.json are all that counts.
    """
    from transformers import PreTrainedConfig

    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer_settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        model_type = settings["model_type"]
        is_plain = bool(tokenizer_settings["tokenizer_class"]) and not (
            "auto_map" in settings or "auto_map" in tokenizer_settings
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # AutoTokenizer has the words for it
        return None
    if not is_plain or not isinstance(model_type, str):
        return None
    config = PreTrainedConfig()
    config.model_type = model_type  # type: ignore[misc]  # a class variable that transformers sets on instances, too
    config._name_or_path = str(folder)
    if "model_name" in settings:
        config.model_name = settings["model_name"]
    return config


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    force_pure_bf16: bool = False,
    attn_implementation: str | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """A causal language model on the CPU, its weights in `dtype`, as `transformers` loads it.

    Raises:
        RequestError: bfloat16 weights without `force_pure_bf16`, an unknown dtype, a model that cannot be loaded, or
            one that only runs its own code or unpickles its weights when nobody allowed that.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from psft.models import varlen  # noqa: F401  # makes psft_varlen known

    check_dtype(dtype, force_pure_bf16=force_pure_bf16)
    folder = resolve_model(name, revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
        )
    except Exception as error:  # a folder from anywhere: what its files make of transformers has no common type
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise
        raise RequestError(
            f"the model in {shown(folder)} cannot be loaded: {_first_line(error)}; copy or save it there again, or "
            "install the version of transformers that wrote it"
        ) from error


def check_dtype(dtype: str, *, force_pure_bf16: bool = False) -> None:
    """Raises RequestError for a weight dtype that is unknown, or bfloat16 that nobody insisted on."""
    if dtype not in ("float32", "bfloat16"):
        raise RequestError(f"dtype={dtype} is not known; use float32 (default) or bfloat16")
    if dtype == "bfloat16" and not force_pure_bf16:
        raise RequestError(PURE_BF16_REASON)


def _fetch_from_hub(name: str, revision: str, *, trust_remote_code: bool, allow_pickle: bool) -> Path:
    """The hub model's snapshot on this machine: Python files and pickled weights only where they are allowed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = [*_HUB_PATTERNS, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if allow_pickle and not any((folder / file).is_file() for file in WEIGHT_FILES):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, "*.bin"]))
        return folder
    except GatedRepoError as error:
        raise RequestError(f"{name} is gated; accept its licence on the hub and run `hf auth login`") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise RequestError(
            f"the hub has no model {name} at revision {shown(revision)}, or it is private; check it or run "
            "`hf auth login`"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"{name} is no local folder and cannot be fetched from the hub ({_first_line(error)}); "
            f"check the name and the network, or give a local folder or {QUICKSTART_NAME}"
        ) from error


def _first_line(error: Exception) -> str:
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0])
