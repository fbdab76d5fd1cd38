"""What the trust region does: share of tokens clipped over steps and by position in the window, and log-ratios."""

from __future__ import annotations

import math

import numpy as np

from psft.reports import series
from psft.reports.charts import Chart, Figure, Line, Missing, to_list
from psft.reports.figures.common import NO_CLIP, NO_STEPS, Inputs, steps_chart
from psft.reports.groups import epsilon_high, group_line
from psft.runs.rows import LOG_RATIO_EDGES

KEPT = "Share of the gradient the clip left"
_WEIGHTS = (
    "Without the clip a token would weigh as much as its ratio, so that a few whose ratio grew a hundredfold carry "
    "most of a step. Little of the ratios' sum can be left where most tokens are."
)


def clip(inputs: Inputs) -> Figure:
    charts = steps_chart(inputs, "clip_fraction", "Clipped tokens over steps", "share of tokens", y_form="percent")
    found = [
        group_line(group, series.clip_by_mini_batch, inputs.budget, source="metrics.jsonl: clip_fraction by mini_batch")
        for group in inputs.groups
    ]
    lines = [line for line in found if line is not None]
    if lines:
        charts.append(
            Chart("Clipped tokens by mini-batch of the window", "mini-batch of the window", "share of tokens", lines,
                  kind="points", y_form="percent")
        )  # fmt: skip
    charts += steps_chart(inputs, "gradient_kept", KEPT, "share of the ratios' sum", y_form="percent")
    charts += steps_chart(
        inputs, "clippable_fraction", "Tokens that can be clipped at all", "share of tokens", y_form="percent"
    )
    return Figure(
        "clip",
        "What the clip does",
        "The clip acts on tokens whose probability grew by more than epsilon_high since the window began. At the "
        "first mini-batch nothing has moved, so it is 0 there and rises along the window. Below 1 % everywhere, PSFT "
        "is plain SFT. A token can be clipped at all only if its old probability was below 1 / (1 + epsilon_high).",
        charts,
        notes=[_WEIGHTS] if any(chart.title == KEPT for chart in charts) else [],
        missing=None if charts else _missing(inputs),
    )


def log_ratios(inputs: Inputs) -> Figure:
    names = _bin_names()
    lines = []
    for group in inputs.groups:
        counts = [run.log_ratio_counts for run in group.runs if run.log_ratio_counts is not None]
        total = np.sum(counts, axis=0) if counts else np.zeros(len(names))
        if total.sum() > 0:
            shares = np.where(total > 0, total / total.sum(), np.nan)
            lines.append(
                Line(
                    group.label, group.style, list(map(float, range(len(names)))), to_list(shares),
                    source="metrics.jsonl: log_ratio_histogram, mini-batches 2 and later, summed over the run",
                    runs=tuple(run.label for run in group.runs if run.log_ratio_counts is not None),
                )
            )  # fmt: skip
    bounds: dict[float, list[int]] = {}
    for group in inputs.groups:
        epsilon = epsilon_high(group.run)
        if epsilon is not None and 0 < epsilon < math.inf and any(line.style == group.style for line in lines):
            bounds.setdefault(math.log1p(epsilon), []).append(group.style)
    marks = [
        (place_of(bound), f"bound: {bound:.3f}", None if len(bounds) == 1 else style)
        for bound, styles in bounds.items()
        for style in styles
    ]
    charts = (
        [Chart("Log-ratio to the old policy", "log-ratio, nats", "share of tokens", lines, kind="points", marks=marks,
               categories=names, ticks=_ticks(), y_form="percent", is_log=True)]
        if lines
        else []
    )  # fmt: skip
    notes = [f"Dotted: the bound, ln(1 + epsilon_high) = {', '.join(f'{b:.3f}' for b in sorted(bounds))}."]
    return Figure(
        "log_ratios",
        "How far probabilities moved within a window",
        "Each token's log-probability now minus at the window's start, over the whole run without first mini-batches. "
        "What lies right of the bound was clipped. A bin without a mark is empty; the axis is logarithmic.",
        charts,
        missing=None if charts else _missing(inputs, "log_ratio_histogram"),
        notes=notes if charts and bounds else [],
    )


def place_of(log_ratio: float) -> float:
    """Where a log-ratio lies on the axis of bins: edge i stands between bins i and i + 1."""
    return float(np.interp(log_ratio, LOG_RATIO_EDGES, np.arange(len(LOG_RATIO_EDGES)) + 0.5))


def _ticks() -> list[tuple[float, str]]:
    """Some edges, few enough for a phone."""
    return [(place_of(value), f"{value:g}") for value in (-2.0, -0.5, -0.1, 0.0, 0.1, 0.5, 2.0)]


def _bin_names() -> list[str]:
    edges = [f"{edge:g}" for edge in LOG_RATIO_EDGES]
    inner = [f"{a} to {b}" for a, b in zip(edges, edges[1:], strict=False)]
    return [f"below {edges[0]}", *inner, f"above {edges[-1]}"]


def _missing(inputs: Inputs, field: str = "") -> Missing:
    from psft.reports.rerun import rerun

    runs = inputs.runs
    if field and any(run.has("clip_fraction") for run in runs):
        return Missing(
            f"metrics.jsonl has no {field}: the run is of a version that did not record it, or has only first "
            "mini-batches so far."
        )
    if not runs or not any(run.num_steps for run in runs):
        return NO_STEPS
    if any(epsilon_high(run) is not None for run in runs):
        return Missing("No window has had a second mini-batch yet, so no ratio has moved from 1.")
    return Missing(NO_CLIP, rerun(runs[0], {"objective": "psft"}, suffix="-psft"))
