"""Under what a run was made: versions, machine, commit, command. Imports nothing it describes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from psft.machine import logical_cores, physical_cores

PACKAGES = (
    "psft",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "reasoning-gym",
    "math-verify",
    "sympy",
    "lm-eval",
    "vllm",
    "deepspeed",
)
"""Distributions whose versions can change a result."""


def describe_environment() -> dict[str, Any]:
    """Versions (null: not installed), Python, platform, cores that this process may use (cpu_count: with hyper-threads),
    memory (bytes), GPUs, git commit, command.

    GPUs are listed only when torch is already imported and has CUDA; this function imports nothing heavy.
    """
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": logical_cores(),
        "physical_cores": physical_cores(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
        "git": _git_commit(),
        "command": command_line(),
    }


def command_line() -> list[str]:
    """`sys.argv` as it may be written down: the value of a flag that carries a secret is replaced."""
    shown = list(sys.argv)
    for position, argument in enumerate(shown):
        flag, sign, _ = argument.partition("=")
        if flag.replace("-", "_") not in ("__hub_token", "__push_to_hub_token"):
            continue
        if sign:
            shown[position] = f"{flag}=<hidden>"
        elif position + 1 < len(shown):
            shown[position + 1] = "<hidden>"
    return shown


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git_commit() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and whether it was modified; null for an installed package."""
    folder = Path(__file__).resolve().parent
    try:
        root = _git(folder, "rev-parse", "--show-toplevel")
        if not (Path(root) / "src" / "psft").is_dir():  # installed into a folder inside somebody else's checkout
            return None
        modified = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
        return {"commit": _git(folder, "rev-parse", "HEAD"), "modified": modified}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()
