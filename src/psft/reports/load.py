"""One run folder in, one `Run` out: whatever can be read of it, and in words what could not.

A run may be going on, have crashed, hold torn or damaged files, or nothing at all. None of that is an error here.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from psft.errors import RequestError
from psft.reports.evaluations import Evaluation, evaluations_of
from psft.runs import RunFolder
from psft.runs.alerts import Alert
from psft.runs.columns import Columns, read_columns, read_parquet, read_whole_rows
from psft.runs.rows import LOG_RATIO_EDGES

STEP_FIELDS = (
    "step", "epoch", "window", "mini_batch", "num_mini_batches", "tokens", "nll", "entropy", "clip_fraction",
    "clippable_fraction", "gradient_kept", "log_ratio_abs_max", "grad_norm", "learning_rate", "tokens_per_second",
    "reward_mean", "reward_std", "kept_group_share", "completion_length_mean",
    "rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy",
)  # fmt: skip
"""What the figures and the verdict read of metrics.jsonl; the tables hold every field."""
REFERENCE_PREFIX = "kl_ref_"
MOST_TOKENS = 60
"""Clipped tokens kept per epoch, those clipped most; the table has all."""

Sink = Callable[[str, str, Columns], None]
"""Is given (label, file name, its columns at full resolution) once, before they are thinned out."""


@dataclass
class Epoch:
    """Clipped tokens of one epoch. tokens: those clipped most, as `psft.runs.rows.ClippedTokenRow`."""

    epoch: int
    clipped: int
    seen: int
    num_tokens: int
    tokens: list[dict[str, Any]]


@dataclass
class Run:
    """What a run folder holds.

    steps: a column for each field of `STEP_FIELDS` that has a value, (num_steps,) float64, NaN = null.
    """

    label: str
    path: str
    info: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 0
    steps: dict[str, np.ndarray] = field(default_factory=dict)
    is_warmup: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    log_ratio_counts: np.ndarray | None = None
    evals: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    clipped: list[Epoch] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    exit_reason: str = "unknown"

    def has(self, name: str) -> bool:
        return name in self.steps

    def column(self, name: str) -> np.ndarray:
        """(num_steps,) float64; all NaN if the run has no such number."""
        return self.steps.get(name, np.full(self.num_steps, np.nan))

    @property
    def config(self) -> dict[str, Any]:
        return _mapping(self.info.get("config"))

    @property
    def objective(self) -> dict[str, Any]:
        return _mapping(self.info.get("objective"))

    @property
    def is_over(self) -> bool:
        """Whether the run has said how it ended."""
        return self.exit_reason.startswith(("finished", "interrupted", "stopped", "failed"))


def load_run(folder: RunFolder, label: str, *, sink: Sink | None = None) -> Run:
    """Read one run folder. Never raises for what its files hold; `Run.notes` says what is missing or damaged."""
    from psft.reports.replay import all_alerts

    run = Run(label=label, path=str(folder.path))
    run.info = _json(run, folder, "run.json", "settings and versions are unknown")
    run.summary = _json(run, folder, "summary.json", None)
    metrics = _noted(run, "metrics.jsonl", read_columns(folder, "metrics.jsonl"))
    for name, rows, value in (("eval.jsonl", run.evals, "value"), ("probe.jsonl", run.probes, "drift_nats_per_token")):
        rows += _measured(run, name, _noted(run, name, read_whole_rows(folder, name)).rows, value)
    run.evaluations, notes = evaluations_of(folder.path)
    run.notes += notes
    _take_steps(run, metrics)
    clipped = _noted(run, "clipped_tokens.parquet", read_parquet(folder, "clipped_tokens.parquet"))
    _take_clipped(run, clipped)
    if sink is not None:
        sink(label, "metrics.jsonl", metrics)
        sink(label, "clipped_tokens.parquet", clipped)
    run.alerts = all_alerts(run, metrics)
    run.exit_reason = _exit_reason(run, folder)
    return run


def find_runs(paths: list[str]) -> list[Path]:
    """The run folders that paths name: each a run, or a folder of runs, which are then taken in order of their names.

    Raises:
        RequestError: a path that is missing or no folder, or that holds no run and no folder with one; all together.
    """
    found: list[Path] = []
    problems = []
    for text in paths:
        path = Path(text)
        if not path.exists():
            problems.append(f"there is no folder {text}")
        elif not path.is_dir():
            problems.append(f"{text} is a file, not the folder of a run")
        elif RunFolder(path).holds_run():
            found.append(path)
        else:
            inner = sorted(item for item in path.iterdir() if item.is_dir() and RunFolder(item).holds_run())
            found += inner
            if not inner:
                problems.append(f"{text} holds no run (no run.json, no metrics.jsonl), nor does a folder in it")
    if problems:
        raise RequestError(
            "; ".join(problems) + ". Give the output_dir of a run of psft train, or a folder that holds such runs."
        )
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]  # each once, where first named


def labels(paths: list[Path]) -> list[str]:
    """A short name for each: the folder's, with as many parents as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while True:
        names = ["/".join(part[-depth:]).lstrip("/") for part in parts]
        if len(set(names)) == len(set(parts)) or depth >= max(map(len, parts)):
            return names
        depth += 1


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _json(run: Run, folder: RunFolder, name: str, without: str | None) -> dict[str, Any]:
    if not (folder.path / name).exists():
        if without is not None:
            run.notes.append(f"{name} is missing: {without}.")
        return {}
    try:
        return folder.read_json(name)
    except (RequestError, OSError) as error:
        reason = str(error).replace(f"{folder.path / name} ", "").split(" Restore")[0]
        run.notes.append(f"{name} {reason}")
        return {}


def _noted(run: Run, name: str, read: Any) -> Any:
    run.notes += read.problems
    if getattr(read, "has_torn_end", False):
        run.notes.append(f"{name} ends in half a row (a crash, or a row being written), which is left out.")
    return read


def _measured(run: Run, name: str, rows: list[dict[str, Any]], value: str) -> list[dict[str, Any]]:
    """Rows in order of steps that say of which step they are and hold a number; of a repeated one the last written."""
    whole: dict[Any, dict[str, Any]] = {}
    for row in rows:
        if is_number(row.get("step")) and (is_number(row.get(value)) or row.get(value) is None):
            names = (str(row.get(key)) for key in ("benchmark", "metric", "k", "group") if key in row)
            key = (row["step"], *names)
            whole.pop(key, None)
            whole[key] = row if is_number(row.get("stderr")) else {**row, "stderr": None}
    if len(whole) < len(rows):
        run.notes.append(f"{name}: {len(rows) - len(whole)} rows are repeated, or name no step or no number; left out.")
    return sorted(whole.values(), key=lambda row: row["step"])


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _take_steps(run: Run, metrics: Columns) -> None:
    """Keep the columns that figures read, in order of steps; a step that stands there twice counts as last written."""
    step = metrics.numbers("step")
    if len(metrics) and not np.isfinite(step).all():
        run.notes.append(f"metrics.jsonl: {int((~np.isfinite(step)).sum())} rows name no step; they are left out.")
    order = np.argsort(step, kind="stable")[: int(np.isfinite(step).sum())]
    is_last = np.append(step[order][1:] != step[order][:-1], True) if len(order) else np.zeros(0, bool)
    if not is_last.all():
        run.notes.append(f"metrics.jsonl: {int((~is_last).sum())} steps stand there twice; the later row counts.")
    order = order[is_last]
    run.num_steps = len(order)
    references = [name for name in metrics.names if name.startswith(REFERENCE_PREFIX)]
    for name in (*STEP_FIELDS, *references):
        values = metrics.numbers(name)[order]
        is_finite = np.isfinite(values)
        if is_finite.any():
            run.steps[name] = np.where(is_finite, values, np.nan)
    stages = metrics.values("stage")
    run.is_warmup = np.array([stages[i] == "warmup" for i in order], bool)
    run.log_ratio_counts = _log_ratio_counts(run, metrics, order)


def _log_ratio_counts(run: Run, metrics: Columns, order: np.ndarray) -> np.ndarray | None:
    """Counted tokens by log ratio over the whole run, mini-batches after the first; None if nothing was counted."""
    if "log_ratio_histogram" not in metrics.names:
        return None
    num_bins = len(LOG_RATIO_EDGES) + 1
    column = metrics.table.column("log_ratio_histogram").combine_chunks()
    if column.null_count == len(column):  # an objective without a ratio
        return None
    rows = order[(run.column("mini_batch") > 1) & ~run.is_warmup]
    try:
        lists = column.take(rows).drop_null()
        counts = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), num_bins)
    except (ValueError, AttributeError, TypeError):
        run.notes.append(f"metrics.jsonl: log_ratio_histogram has not {num_bins} bins a row; it is left out.")
        return None
    return counts.sum(axis=0) if len(counts) else None


def _take_clipped(run: Run, clipped: Columns) -> None:
    epochs, counts, seen = (clipped.numbers(name) for name in ("epoch", "clipped", "seen"))
    for epoch in np.unique(epochs[np.isfinite(epochs)]):
        rows = np.flatnonzero(epochs == epoch)
        top = rows[np.argsort(-counts[rows], kind="stable")][:MOST_TOKENS]
        top = top[counts[top] > 0]
        run.clipped.append(
            Epoch(
                epoch=int(epoch),
                clipped=int(np.nansum(counts[rows])),
                seen=int(np.nansum(seen[rows])),
                num_tokens=int((counts[rows] > 0).sum()),
                tokens=clipped.table.take(top).to_pylist(),
            )
        )


def _exit_reason(run: Run, folder: RunFolder) -> str:
    """How the run ended, or that it has not said so. A summary older than the last --resume is of the time before."""
    reason = str(run.summary.get("exit_reason") or "")
    last = run.column("step")[-1] if run.num_steps else 0
    resumed = run.info.get("resumed")
    at = resumed[-1].get("at") if isinstance(resumed, list) and resumed and isinstance(resumed[-1], dict) else None
    is_old = last > (run.summary.get("steps") or 0)
    try:
        written = datetime.datetime.fromtimestamp((folder.path / "summary.json").stat().st_mtime, datetime.timezone.utc)
        is_old = is_old or (at is not None and datetime.datetime.fromisoformat(str(at)) > written)
    except (OSError, ValueError, TypeError):
        pass
    if reason and not is_old:
        return reason
    return "not ended: it is going on, or was killed" if run.num_steps or run.info else "nothing recorded yet"
