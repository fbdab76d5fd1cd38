"""The command line of a run, changed: what a person types to do it again with other settings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from psft.config import OBJECTIVE_SETTINGS
from psft.reports.load import Run

_NOT_REPEATED = ("resume", "resume_from_checkpoint", "overwrite_output_dir", "allow_changed")
_COMMANDS = ("train", "quickstart", "dpo", "grpo")


def words_of(run: Run) -> list[str] | None:
    """`["psft", "train", ...]` as the run was started; None if a program of the user's own started it.

    Where run.json does not say, the command stands with a name to fill in.
    """
    command = run.info.get("command")
    if not isinstance(command, list) or not command:
        return ["psft", "train", "RECIPE.yaml"]
    words = [str(word) for word in command]
    program = PurePath(words[0]).name
    is_ours = program in ("psft", "psft.exe", "__main__.py") or words[0].endswith(("cli/main.py", "cli\\main.py"))
    return ["psft", *words[1:]] if is_ours and words[1:2] and words[1] in _COMMANDS else None


def rerun(run: Run, changes: Mapping[str, Any], *, suffix: str) -> str:
    """The run's command with other values of settings, into a new folder; for a script, the settings to change in it.

    suffix: what the new folder's name gets, e.g. `-lower-lr`.
    """
    new = {**changes, "output_dir": run.path + suffix}
    words = words_of(run)
    if words is None:
        return "PSFTConfig(" + ", ".join(f"{name}={_python(value)}" for name, value in new.items()) + ")"
    of_objective = OBJECTIVE_SETTINGS if "objective" in new else ()  # another objective may not take them
    kept = drop_flags(words, {*new, *_NOT_REPEATED, *of_objective})
    return shlex.join([*kept, *(word for name, value in new.items() for word in (f"--{name}", _text(value)))])


def resume(run: Run) -> str | None:
    """The command that goes on with a run that was stopped; None for a script's."""
    words = words_of(run)
    if words is None:
        return None
    return shlex.join([*drop_flags(words, {"resume", "overwrite_output_dir"}), "--resume"])


def drop_flags(words: list[str], names: set[str]) -> list[str]:
    """The words without the flags of these settings and what belongs to them, in either spelling (`-` or `_`, `=`)."""
    kept: list[str] = []
    is_dropping = False
    for word in words:
        if word.startswith("--"):
            is_dropping = word[2:].partition("=")[0].replace("-", "_") in names
        if not is_dropping:
            kept.append(word)
    return kept


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _python(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)
