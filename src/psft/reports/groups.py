"""Which runs belong together: runs that differ in seed alone are one line, runs that differ in epsilon_high a sweep."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from psft.reports.charts import Budget, Line, make_line, to_list
from psft.reports.load import Run
from psft.reports.rerun import words_of
from psft.reports.series import Points

NO_DIFFERENCE = re.compile(
    r"seed|data_seed|output_dir|logging_dir|run_name|overwrite_output_dir|resume|resume_from_checkpoint|allow_changed"
    r"|report_to|disable_tqdm|log_level(_replica)?|log_on_each_node|project|trackio_space_id|ref_cache_dir"
    r"|logging_(steps|first_step|strategy|nan_inf_filter)|save_(steps|strategy|total_limit|on_each_node|only_model)"
    r"|dataloader_(num_workers|pin_memory|prefetch_factor|persistent_workers)|push_to_hub(_\w+)?|hub_\w+"
)
"""Settings that say where results go, not what is learned: runs that differ in them alone are repetitions."""

BAND = "line: mean over the seeds; band: smallest to largest of them"


@dataclass(frozen=True)
class Group:
    """Runs of one setting, one for each seed. style: its colour, dash and marker in every figure."""

    label: str
    style: int
    runs: tuple[Run, ...]

    @property
    def run(self) -> Run:
        """The first of them, whose settings stand for all."""
        return self.runs[0]


def settings(run: Run, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What decides what a run learns, flat, by name; two runs with equal settings are repetitions of each other."""
    info = run.info
    flat = {f"config.{name}": value for name, value in run.config.items() if not NO_DIFFERENCE.fullmatch(name)}
    words = words_of(run)
    flat["stage"] = words[1] if words else None  # train, dpo, grpo
    for part in ("objective", "warmup", "model", "data", "num_train_rows", "world_size", "distributed_type"):
        _flatten(part, info.get(part), flat)
    return {name: value for name, value in flat.items() if name.rpartition(".")[2] not in without}


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{name}.{key}", item, into)
    else:
        into[name] = value


def make_groups(runs: list[Run]) -> list[Group]:
    """Runs in the order given, those of equal settings together. A run without run.json stands alone."""
    members: dict[str, list[Run]] = {}
    for i, run in enumerate(runs):
        is_known = bool(run.config or run.objective)
        key = json.dumps(settings(run), sort_keys=True, default=str) if is_known else f"unknown {i}"
        members.setdefault(key, []).append(run)
    names = [_group_label(group) for group in members.values()]
    found = [
        Group(name if names.count(name) == 1 else group[0].label, style, tuple(group))
        for style, (name, group) in enumerate(zip(names, members.values(), strict=True))
    ]
    return found


def _group_label(runs: list[Run]) -> str:
    labels = [run.label for run in runs]
    if len(labels) == 1:
        return labels[0]
    seeds = {str(run.info.get("seed")) for run in runs}
    what = "seeds" if len(seeds) == len(runs) else "runs"
    stem = re.sub(r"[-_./ ]*(seed|s)?[-_./ ]*$", "", os.path.commonprefix(labels))
    return f"{stem or labels[0]} ({len(labels)} {what})"


def epsilon_high(run: Run) -> float | None:
    """The bound of the ratio a run was asked for: inf without clipping, None for an objective that has none."""
    found = run.objective.get("settings")
    if not isinstance(found, dict) or "epsilon_high" not in found:
        return None
    value = found["epsilon_high"]
    return math.inf if value is None else float(value)  # run.json has no infinity: it is null there


def sweeps(groups: list[Group]) -> list[list[Group]]:
    """Families of groups that differ in epsilon_high alone, each rising in it."""
    families: dict[str, list[tuple[float, Group]]] = {}
    for group in groups:
        epsilon = epsilon_high(group.run)
        if epsilon is not None:
            key = json.dumps(settings(group.run, without=("epsilon_high",)), sort_keys=True, default=str)
            families.setdefault(key, []).append((epsilon, group))
    found = [sorted(family, key=lambda item: item[0]) for family in families.values()]
    return [[group for _, group in family] for family in found if len({epsilon for epsilon, _ in family}) > 1]


def group_line(
    group: Group,
    points: Callable[[Run], Points | None],
    budget: Budget,
    *,
    source: str,
    label: str = "",
    style: int = -1,
    period: int = 1,
) -> Line | None:
    """One line for a group: of its one run with standard errors, or the mean over its runs with a band.

    points: x, y, standard error of a run, or None if it has none. period: see `make_line`.
    """
    found = [(run, run_points) for run in group.runs if (run_points := points(run)) is not None]
    found = [(run, (x, y, error)) for run, (x, y, error) in found if np.isfinite(y).any()]
    if not found:
        return None
    fields: dict[str, Any] = {"period": period, "source": source, "runs": tuple(run.label for run, _ in found)}
    label, style = label or group.label, group.style if style < 0 else style
    if len(found) == 1:
        x, y, error = found[0][1]
        if error is not None and len(x) <= budget.points:
            fields["error"] = to_list(error)
        return make_line(label, style, x, y, budget, **fields)
    x, mean, low, high = over_runs([(x, y) for _, (x, y, _) in found])
    return make_line(label, style, x, mean, budget, low=low, high=high, **fields)


def over_runs(series: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, smallest and largest at every x that any series has, over those that have a value there."""
    x = np.unique(np.concatenate([xs for xs, _ in series]))
    table = np.full((len(series), len(x)), np.nan)
    for i, (xs, ys) in enumerate(series):
        table[i, np.searchsorted(x, xs)] = ys
    is_there = np.isfinite(table)
    num = is_there.sum(axis=0)
    mean = np.where(num > 0, np.where(is_there, table, 0.0).sum(axis=0) / np.maximum(num, 1), np.nan)
    low = np.where(is_there, table, np.inf).min(axis=0)
    high = np.where(is_there, table, -np.inf).max(axis=0)
    return x, mean, np.where(num > 0, low, np.nan), np.where(num > 0, high, np.nan)
