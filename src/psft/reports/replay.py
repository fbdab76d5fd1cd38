"""The alerts of a run: those it wrote down, and those its rows give when they are watched again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psft.runs.alerts import Alert, Watch
from psft.runs.columns import Columns

if TYPE_CHECKING:
    from psft.reports.load import Run

_WATCHED = (
    "step", "stage", "epoch", "mini_batch", "num_mini_batches", "tokens", "nll", "entropy", "clip_fraction",
    "grad_norm",
)  # fmt: skip
"""The fields of metrics.jsonl that `Watch` reads."""
_FROM_ONE = ("mini_batch", "num_mini_batches")
"""Of these, absent means 1, and null would mean nothing."""


def all_alerts(run: Run, metrics: Columns) -> list[Alert]:
    """Alerts in order of steps, each name once: of run.json, then what `psft.runs.alerts.Watch` says of the rows.

    A run that was killed has not written its last alerts, and a run of an older version none: hence the replay.
    """
    found = {alert.name: alert for alert in replay(metrics, run.evals, run.probes, _drift_budget(run))}
    for entry in run.info.get("alerts") or []:
        if isinstance(entry, dict) and entry.get("message"):
            alert = Alert(_whole(entry.get("step")), str(entry.get("name") or "alert"), str(entry["message"]))
            found[alert.name] = alert
    return sorted(found.values(), key=lambda alert: alert.step)


def replay(
    metrics: Columns, evals: list[dict[str, Any]], probes: list[dict[str, Any]], drift_budget: float | None
) -> list[Alert]:
    """What a fresh watch says of a run's rows, taken in the order of their steps, measurements after the step's own."""
    watch = Watch(drift_budget)
    later = [(_whole(row.get("step")), watch.evaluated, row) for row in evals]
    later += [(_whole(row.get("step")), watch.probed, row) for row in probes]
    later.sort(key=lambda item: item[0])
    names = [name for name in _WATCHED if name == "stage" or metrics.is_numeric(name)]
    columns = [metrics.values(name) for name in names]
    absent_is_one = [name for name, values in zip(names, columns, strict=True) if name in _FROM_ONE and None in values]
    waiting = 0
    for values in zip(*columns, strict=True):
        row = dict(zip(names, values, strict=True))
        for name in absent_is_one:
            if row[name] is None:
                del row[name]
        step = row.get("step")
        if step is None or step != step:
            continue
        while waiting < len(later) and later[waiting][0] < step:
            later[waiting][1](later[waiting][2])
            waiting += 1
        watch.metrics(row)
    for _, tell, row in later[waiting:]:
        tell(row)
    return watch.said


def _drift_budget(run: Run) -> float | None:
    value = run.config.get("drift_budget")
    return float(value) if isinstance(value, int | float) else None


def _whole(step: Any) -> int:
    return int(step) if isinstance(step, int | float) and step == step else 0
