"""How the runs were made: settings, data statistics, versions and machines, with what differs set apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from psft.reports.load import Run

MOST_COLUMNS = 6
"""Runs up to which a table has a column for each; more runs become rows."""
_SETTINGS = (
    "objective", "warmup", "config", "model", "data", "num_train_rows", "seed", "world_size", "distributed_type",
    "deterministic", "matmul_precision", "num_threads",
)  # fmt: skip
_INFINITE = ("objective.settings.epsilon_high", "objective.settings.tv_delta")
"""Bounds that an objective always has: run.json, which knows no infinity, has null where there is no clipping."""
_TIMES = ("started_at", "resumed")


@dataclass(frozen=True)
class Comparison:
    """common: (name, value) where all runs agree. differing: (name, one value a run)."""

    labels: list[str]
    common: list[tuple[str, str]] = field(default_factory=list)
    differing: list[tuple[str, list[str]]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"runs": self.labels, "common": dict(self.common), "differing": dict(self.differing)}


def settings(runs: list[Run]) -> Comparison:
    """Every resolved setting of run.json."""
    return compare(runs, [_flat({name: run.info[name] for name in _SETTINGS if name in run.info}) for run in runs])


def environment(runs: list[Run]) -> Comparison:
    """Versions, machine, git commit, command and times."""
    found = []
    for run in runs:
        parts = _flat({"": run.info.get("environment", {}), **{name: run.info.get(name) for name in _TIMES}})
        parts = {name.lstrip("."): value for name, value in parts.items() if name != ".command"}
        command = run.info.get("command")
        parts["command"] = " ".join(map(str, command)) if isinstance(command, list) else "unknown"
        found.append(parts)
    return compare(runs, found)


def data_reports(runs: list[Run]) -> Comparison:
    """What was found in the training and held-out data: rows, tokens, lengths, rejected rows and why."""
    return compare(runs, [_flat(run.info.get("data_reports") or {}) for run in runs])


def compare(runs: list[Run], flats: list[dict[str, Any]]) -> Comparison:
    """Which names have one value in all runs, and which differ; a name that a run lacks differs there."""
    common, differing = [], []
    for name in dict.fromkeys(name for flat in flats for name in flat):
        values = [show(flat[name]) if name in flat else "\u2013" for flat in flats]
        if len(set(values)) == 1:
            common.append((name, values[0]))
        else:
            differing.append((name, values))
    return Comparison([run.label for run in runs], common, differing)


def show(value: Any) -> str:
    """A setting as a person writes it; null is `none`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list):
        return ", ".join(show(item) for item in value) or "none"
    return str(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            found |= _flat(item, f"{name}.")
        else:
            found[name] = "inf" if item is None and name in _INFINITE else item
    return found
