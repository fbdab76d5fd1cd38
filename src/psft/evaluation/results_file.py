"""The results file, MODEL.SUITE.json: one form for all who evaluate, and what its readers must know of it. No torch."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psft.evaluation.backends.base import Description
from psft.evaluation.identity import plain_name
from psft.runs import RunFolder, describe_environment

SCHEMA = 1
"""Of the file; rises when a field changes its meaning."""
TRUNCATED = 0.05
"""Share of answers cut off above which a score is said to be doubtful."""


def results_path(folder: Path, model: str, suite: str) -> Path:
    """Where the results of a model, by its plain name, on a suite lie in a folder."""
    return folder / f"{model}.{plain_name(suite)}.json"


def write_results(
    path: Path,
    *,
    model: Mapping[str, Any],
    suite: str,
    seed: int | None,
    backend: Description,
    benchmarks: Sequence[Mapping[str, Any]],
    started: float,
    samples_made: int,
    **more: Any,
) -> dict[str, Any]:
    """Write the file, whole or not at all, and give back what it holds.

    Args:
        model: its name, identity and step, and what it was asked as. seed: of the evaluation; None = none decides.
        benchmarks: as `results.describe` gives them. started: `time.monotonic()` of then. more: further fields.
    """
    content = {
        "schema": SCHEMA,
        "model": dict(model),
        "suite": suite,
        "seed": seed,
        "backend": vars(backend),
        "written_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "wall_time_s": round(time.monotonic() - started, 1),
        "samples_made": samples_made,
        "environment": describe_environment(),
        **more,
        "benchmarks": list(benchmarks),
    }
    RunFolder(path.parent).write_json(path.name, content)
    return content
