"""Names for what a prepared data set depends on: a source's content, a tokenizer, the code that prepares.

Each is a SHA-256 in hex over the content itself, never over dates or paths, so a copy has the name of its original and
a file that was changed in place has another. Dates only tell, beside it, that a source was written while it was read.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psft.checksums import sha256_of
from psft.errors import RequestError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_A_TIME = 4096
_PACKAGES = ("psft", "transformers", "tokenizers", "jinja2", "trl", "datasets", "pyarrow")
"""Packages that read, render or tokenise rows, TRL by its templates with marks around the answers."""


def digest_of_file(path: Path) -> str:
    """Digest of a file's bytes. Raises RequestError: it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise RequestError(
            f"{shown(path)} cannot be read: {error.strerror or error}. Check the file and its rights."
        ) from error


def digest_of_folder(folder: Path) -> str:
    """Digest of every file of a folder, with its name within it. Raises RequestError: one cannot be read."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()}\0{digest_of_file(path)}\n".encode())
    return digest.hexdigest()


def stamp_of(path: Path) -> object:
    """Which files are there and when each was last written: another value after every write, whatever was written."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(file), *_marks(file)) for file in files]


def _marks(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_of_dataset(dataset: Any) -> str:
    """Digest of a data set of `datasets`: its columns as Arrow writes them."""
    import pyarrow as pa

    digest = hashlib.sha256()
    blocks = dataset.with_format("arrow")
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        table: pa.Table = blocks[start : min(start + _ROWS_AT_A_TIME, len(dataset))]
        for batch in table.replace_schema_metadata(None).combine_chunks().to_batches():
            digest.update(str(batch.schema).encode())
            digest.update(batch.serialize())
    return digest.hexdigest()


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Digest of all that decides what a tokenizer and its chat template make of a text.

    None where that cannot be told from outside: a tokenizer written in Python, or one that came with its model.
    """
    kind = type(tokenizer)
    if not tokenizer.is_fast or kind.__module__.partition(".")[0] != "transformers":
        return None
    try:
        backend = _backend(tokenizer.backend_tokenizer)  # type: ignore[attr-defined]
    except Exception:  # tokenizers raises plain Exceptions, for parts written in Python
        return None
    plain = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int | float)}
    parts = {
        "kind": f"{kind.__module__}.{kind.__qualname__}",
        "backend": hashlib.sha256(backend.encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": [tokenizer.special_tokens_map, tokenizer.all_special_tokens],
        "settings": {name: value for name, value in plain.items() if name not in ("is_local", "local_files_only")},
        "control": getattr(tokenizer, "chat_control_tokens", None),
    }
    return digest_of_values(parts)


def _backend(backend: Any) -> str:
    """A tokenizer of `tokenizers` as text, without what the last call has asked for: every call sets that anew."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        return backend.to_str()
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


@functools.cache
def digest_of_code() -> str:
    """Digest of this room's source files, psft's version and those of the packages and the Python they rest on."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parent / "errors.py", folder.parent / "labels.py"]
    parts = {path.name: digest_of_file(path) for path in files}
    versions = {name: _version(name) for name in _PACKAGES}
    return digest_of_values(parts | versions | {"Python": platform.python_version()})


def digest_of_values(values: dict[str, Any]) -> str:
    """Digest of plain values by name; the order of the names does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
