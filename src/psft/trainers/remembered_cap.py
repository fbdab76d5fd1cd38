"""Caps of micro-batches that were measured, or lowered when memory ran out: one small file each in psft's cache.

A file is named by a digest of everything its cap depends on and says it in plain words, so that `psft plan` can show
what is known. A file that is torn or was changed is ignored with a warning, and the cap is measured anew.

What is taken without a measurement is here, too: a plan shows it, and `micro_batch_cap` would bring in much of torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psft.machine import cache_folder

logger = logging.getLogger(__name__)

CPU_TOKENS = 1024
"""The fastest of our measurements; larger micro-batches only add padding."""
UNMEASURED_TOKENS = 8192
"""A cautious guess for devices whose memory is not measured."""
_FORMAT = 1
_PREFIX = "micro_batch_cap-"
_NOT_SIZES = ("dtype", "torch_dtype", "use_cache", "transformers_version", "architectures", "name_or_path")


@dataclass(frozen=True)
class RememberedCap:
    """tokens: the cap. lowered_from: what it was when memory ran out, else None. measured: how it was found.

    depends_on: plain values by name.
    """

    tokens: int
    depends_on: Mapping[str, Any]
    lowered_from: int | None = None
    measured: Mapping[str, Any] | None = None


def caps_folder() -> Path:
    """Where caps are remembered."""
    return cache_folder() / "micro_batch_caps"


def key_of(depends_on: Mapping[str, Any]) -> str:
    written = json.dumps({"format": _FORMAT, **depends_on}, sort_keys=True, default=str)
    return hashlib.sha256(written.encode()).hexdigest()[:32]


def read_cap(folder: Path, depends_on: Mapping[str, Any]) -> RememberedCap | None:
    """The cap for these values, or None where there is none or its file cannot be trusted."""
    return _read(_path(folder, key_of(depends_on)))


def write_cap(folder: Path, cap: RememberedCap) -> None:
    """Write the cap as a whole or not at all; a folder that cannot be written to is a warning."""
    content = {
        "tokens": cap.tokens, "lowered_from": cap.lowered_from, "measured": cap.measured,
        "depends_on": dict(cap.depends_on),
    }  # fmt: skip
    path = _path(folder, key_of(cap.depends_on))
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**content, "sha256": _checksum(content)}, indent=1, default=str)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        logger.warning(
            "the cap of micro-batches cannot be kept in %s (%s): the next run measures again.", folder, error
        )


def matching_caps(folder: Path, **known: Any) -> Iterator[RememberedCap]:
    """Every cap whose `depends_on` has these values; damaged files are passed over with a warning."""
    for path in sorted(folder.glob(f"{_PREFIX}*.json")):
        cap = _read(path)
        if cap is not None and all(cap.depends_on.get(name) == value for name, value in known.items()):
            yield cap


def config_digest(config: Mapping[str, Any]) -> str:
    """Of a model's configuration, without what changes no size: names, token ids, precision, versions."""
    return hashlib.sha256(json.dumps(_sizes(config), sort_keys=True, default=str).encode()).hexdigest()[:32]


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _sizes(value) if isinstance(value, Mapping) else value
        for name, value in ((str(key), value) for key, value in config.items())
        if not (name.startswith("_") or name.endswith(("token_id", "token_ids")) or name in _NOT_SIZES)
    }


def _path(folder: Path, key: str) -> Path:
    return folder / f"{_PREFIX}{key}.json"


def _read(path: Path) -> RememberedCap | None:
    try:
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        checksum = content.pop("sha256")
        if checksum != _checksum(content):
            raise ValueError("it does not match its checksum")
        if _path(path.parent, key_of(content["depends_on"])) != path:
            raise ValueError("it is named for other values")
        return RememberedCap(
            int(content["tokens"]), content["depends_on"], content["lowered_from"], content["measured"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the remembered cap in %s is ignored (%s: %s).", path, type(error).__name__, error)
        return None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
