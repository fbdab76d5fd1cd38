"""Which measurement stands for a run and for the model before training in the tables of scores.

A run is represented by one checkpoint for each benchmark: the one its folder's `best` points to if that was evaluated,
else the last. A whole results file of `psft eval` counts before one of a part, and before a row of eval.jsonl.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from psft.reports import benchmarks
from psft.reports.evaluations import Evaluation, Measurement
from psft.reports.load import Run, is_number
from psft.runs.checkpoints import linked_best

NO_NAME = "the base model"
"""Of a run that does not say what it started from."""


def base_name(run: Run) -> str:
    """What run.json says the run started from."""
    model = run.info.get("model")
    name = model.get("model_name_or_path") if isinstance(model, Mapping) else None
    return name if isinstance(name, str) and name else NO_NAME


def chosen(run: Run, known: Iterable[str]) -> dict[str, Measurement]:
    """The measurement after training that stands for a run, by benchmark."""
    best = _best_step(Path(run.path))
    found = [m for m in _of_files(run.evaluations) if m.step != 0]
    found += [m for m in _of_rows(run, known) if m.step]

    def weight(m: Measurement) -> tuple[Any, ...]:
        step = math.inf if m.step is None else m.step
        return (best is not None and m.step == best, m.is_whole, m.items is not None, step, m.num_samples)

    return {name: max(some, key=weight) for name in known if (some := [m for m in found if m.benchmark == name])}


def _best_step(run: Path) -> int | None:
    """Of the checkpoint that RUN/best points to."""
    try:
        best = linked_best(run)
    except OSError:
        return None
    match = re.fullmatch(r"checkpoint-(\d{1,12})", best.name) if best is not None else None
    return int(match[1]) if match else None


def _of_files(evaluations: Iterable[Evaluation]) -> list[Measurement]:
    """Their measurements by the registry's spelling of benchmarks."""
    found = [m for evaluation in evaluations for m in evaluation.measurements]
    return [replace(m, benchmark=benchmarks.canonical(m.benchmark)) for m in found]


def _of_rows(run: Run, known: Iterable[str]) -> list[Measurement]:
    """What eval.jsonl says, of each benchmark by its main metric."""
    found = []
    for score in (*benchmarks.scores([run], "in"), *benchmarks.scores([run], "out")):
        name = benchmarks.canonical(score[0])
        for row in run.evals if name in known else ():
            k = row.get("k") if is_number(row.get("k")) else None
            is_it = benchmarks.canonical(str(row.get("benchmark"))) == name and (row.get("metric"), k) == score[1:]
            if is_it and is_number(row.get("value")) and 0 <= row["value"] <= 1:
                n = row.get("n") if is_number(row.get("n")) else None
                found.append(Measurement(name, row["value"], row["stderr"], n, k, int(row["step"]), "eval.jsonl"))
    return found


def base_scores(
    runs: Sequence[Run], bases: Sequence[Evaluation], known: Iterable[str]
) -> tuple[dict[str, dict[str, Measurement]], list[str]]:
    """Scores of the models before training, by the name runs give them; and what was assumed, in words."""
    found: dict[str, dict[str, Measurement]] = {}
    notes = []
    models = list(dict.fromkeys(base_name(run) for run in runs))
    for model in models:
        own = [run for run in runs if base_name(run) == model]
        given = [base for base in bases if any(_is_same_model(name, model) for name in base.names)]
        if not given and bases and len(models) == 1:
            given = list(bases)
            named = " and ".join(dict.fromkeys(name for base in bases for name in base.names[:1]))
            notes.append(f"{named or 'The model'} of --base is taken for the base of these runs, which name {model}.")
        some = _of_files(given) or [m for run in own for m in _of_files(run.evaluations) if m.step == 0]
        rows = [m for run in own for m in _of_rows(run, known) if m.step == 0]
        of_model: dict[str, Measurement] = {}
        for m in (*rows, *sorted(some, key=lambda m: (m.is_whole, m.num_samples))):
            if m.benchmark in known:
                of_model[m.benchmark] = m
        found[model] = of_model
    return found, notes


def _is_same_model(one: str, other: str) -> bool:
    return one == other or PurePath(one).name.lower() == PurePath(other).name.lower()
