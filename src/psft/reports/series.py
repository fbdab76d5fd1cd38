"""Numbers of one run as series: what figures draw and what the verdict reads, each from one place."""

from __future__ import annotations

from typing import Any

import numpy as np

from psft.reports.load import Run

Points = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""x, y and standard error (None: not known), each (n,) float64, rising in x."""
ALL_PROMPTS = "all"
"""The retention probe's group of all its prompts."""


def of_steps(run: Run, field: str) -> Points | None:
    """A field of metrics.jsonl over steps, NaN where it is null; None if the run has none."""
    return (run.column("step"), run.column(field), None) if run.has(field) else None


def from_rows(rows: list[dict[str, Any]], value: str) -> Points | None:
    """step, `value` and stderr of rows; rows without a value are left out. None if none is left."""
    rows = [row for row in rows if row.get(value) is not None]
    if not rows:
        return None
    steps, values = np.array([float(row["step"]) for row in rows]), np.array([float(row[value]) for row in rows])
    errors = np.array([float(row["stderr"]) if row.get("stderr") is not None else np.nan for row in rows])
    return steps, values, errors if np.isfinite(errors).any() else None


def held_out_names(runs: list[Run], metric: str) -> list[str]:
    """The data sets on which eval.jsonl has `nll` or `entropy`, in the order of the file."""
    rows = (row for run in runs for row in run.evals if row.get("metric") == metric)
    return list(dict.fromkeys(str(row.get("benchmark")) for row in rows))


def held_out_rows(run: Run, name: str, metric: str) -> list[dict[str, Any]]:
    """The rows of one data set that have a value, in order of steps."""
    rows = (row for row in run.evals if row.get("metric") == metric and str(row.get("benchmark")) == name)
    return [row for row in rows if row.get("value") is not None]


def held_out(run: Run) -> tuple[str, list[dict[str, Any]]]:
    """The first held-out data set's name and its rows of NLL; "" and none without one."""
    names = held_out_names([run], "nll")
    return (names[0], held_out_rows(run, names[0], "nll")) if names else ("", [])


def drift(run: Run, kind: str = ALL_PROMPTS) -> Points | None:
    """The retention probe over steps: drift in nats per token."""
    return from_rows([row for row in run.probes if str(row.get("group")) == kind], "drift_nats_per_token")


def steps_a_window(run: Run) -> int:
    """K, the mini-batches of a window; 1 where it is not known."""
    sizes = run.column("num_mini_batches")
    return max(1, int(np.nanmax(sizes))) if np.isfinite(sizes).any() else 1


def entropy_at(run: Run, step: float) -> float:
    """Mean training entropy over the window that ends at `step`; over the first window for step 0; NaN: none."""
    steps, entropy = run.column("step"), run.column("entropy")
    width = steps_a_window(run)
    part = entropy[:width] if step <= 0 else entropy[(steps <= step) & (steps > step - width)]
    part = part[np.isfinite(part)]
    return float(part.mean()) if len(part) else float("nan")


def clip_by_mini_batch(run: Run) -> Points | None:
    """Share of counted tokens clipped at each position in the window, over all windows, the warm-up left out."""
    fraction, tokens, position = run.column("clip_fraction"), _tokens(run), run.column("mini_batch")
    is_counted = np.isfinite(fraction) & np.isfinite(position) & ~run.is_warmup
    positions = np.unique(position[is_counted])
    if not len(positions):
        return None
    shares = [_weighted(fraction, tokens, is_counted & (position == at)) for at in positions]
    return positions, np.array(shares), None


def clip_share(run: Run) -> float | None:
    """Share of counted tokens clipped in mini-batches 2 and later, the warm-up left out; None: no clip, or none yet."""
    fraction = run.column("clip_fraction")
    is_counted = np.isfinite(fraction) & (run.column("mini_batch") > 1) & ~run.is_warmup
    return _weighted(fraction, _tokens(run), is_counted) if is_counted.any() else None


def _tokens(run: Run) -> np.ndarray:
    """Counted tokens of each step; all alike where they were not recorded."""
    return np.nan_to_num(run.column("tokens")) if run.has("tokens") else np.ones(run.num_steps)


def _weighted(values: np.ndarray, weights: np.ndarray, where: np.ndarray) -> float:
    return float((values[where] * weights[where]).sum() / max(weights[where].sum(), 1.0))
