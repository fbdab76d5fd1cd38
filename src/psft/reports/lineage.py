"""Which run began where another one ended: stages of one model, told by the folder that a run took its model from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from psft.reports.load import Run
from psft.reports.rerun import words_of


@dataclass(frozen=True)
class Start:
    """The run whose weights another began with, and the optimizer steps those had seen in it."""

    run: Run
    steps: int


def stage_of(run: Run) -> str:
    """The command that made a run: train, dpo, grpo; train where a program of the user's own did."""
    words = words_of(run)
    return words[1] if words else "train"


def model_of(run: Run) -> str | None:
    """The name or folder of the model a run began with, as run.json has it; None where it does not say."""
    model = run.info.get("model")
    name = model.get("model_name_or_path") if isinstance(model, dict) else None
    return name if isinstance(name, str) and name else None


def start_of(run: Run, runs: Sequence[Run]) -> Start | None:
    """Where a run began: its model is the folder, or a checkpoint, of one of `runs`. None: of none of them.

    Paths are compared as they are on this machine now, and as both runs wrote them down, for folders that were moved
    together.
    """
    name = model_of(run)
    if name is None:
        return None
    for other in runs:
        inner = None if other is run else _inside(name, other)
        if inner is not None:
            found = re.match(r"checkpoint-(\d+)$", inner.parts[0]) if inner.parts else None
            return Start(other, int(found[1]) if found else other.num_steps)
    return None


def steps_before(run: Run, runs: Sequence[Run]) -> int:
    """Optimizer steps of all stages before a run; 0 for one that began with a model of no other run."""
    before, seen = 0, {id(run)}
    start = start_of(run, runs)
    while start is not None and id(start.run) not in seen:
        before += start.steps
        seen.add(id(start.run))
        start = start_of(start.run, runs)
    return before


def _inside(name: str, run: Run) -> PurePath | None:
    """The path of a model inside a run's folder, `.` for the folder itself; None: it lies elsewhere."""
    output_dir = run.config.get("output_dir")
    pairs: list[tuple[PurePath, PurePath]] = [(Path(name).resolve(), Path(run.path).resolve())]
    if isinstance(output_dir, str) and output_dir:
        pairs.append((PurePath(name), PurePath(output_dir)))
    for path, folder in pairs:
        if path.is_relative_to(folder):
            return path.relative_to(folder)
    return None
