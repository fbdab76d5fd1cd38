"""What this machine gives psft: so far the folder of its cache. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """psft's cache: $PSFT_CACHE, else $XDG_CACHE_HOME/psft, else ~/.cache/psft. Not created here."""
    if named := os.environ.get("PSFT_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "psft"
