"""The page that `psft COMMAND --help` prints, kept once it was made: making it imports torch, transformers and TRL.

A page is named by everything its text follows from: versions, and the files that declare the settings. So it is never
that of another version, nor of files that somebody has edited in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path

from psft.machine import cache_folder

_PACKAGES = ("torch", "transformers", "trl", "accelerate")
_DECLARED_IN = (
    ("psft", "*.py"), ("psft", "cli/*.py"), ("psft", "trainers/*_config.py"), ("trl", "trainer/*_config.py"),
    ("transformers", "training_args.py"),
)  # fmt: skip


def kept_page(command: str) -> str | None:
    """The page as it was printed before, or None."""
    try:
        return _path(command).read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError):
        return None


def keep_page(command: str, text: str) -> None:
    """Keep a page for next time, where the cache can be written."""
    with contextlib.suppress(OSError, ImportError):
        path = _path(command)
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{command}-*.txt"):
            old.unlink(missing_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.part")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)


def _path(command: str) -> Path:
    parts: dict[str, object] = {"python": platform.python_version()}
    parts |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    for package, pattern in _DECLARED_IN:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            for file in sorted(Path(folder).glob(pattern)):
                status = file.stat()
                parts[str(file)] = [status.st_size, status.st_mtime_ns]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "help" / f"{command}-{key}.txt"
