"""What epsilon_high does (paper, figure 9): runs that differ in it alone, by entropy, gradient norm and score."""

from __future__ import annotations

import math

import numpy as np

from psft.reports import benchmarks, series
from psft.reports.charts import Chart, Figure, Line, to_list
from psft.reports.figures.common import Inputs, needs, steps_chart
from psft.reports.groups import Group, epsilon_high, sweeps
from psft.reports.load import Run
from psft.reports.series import Points


def epsilon_sweep(inputs: Inputs) -> Figure:
    charts: list[Chart] = []
    families = sweeps(inputs.groups)
    for family in families:
        charts += _charts(family, inputs, suffix=f" ({family[0].label} ...)" if len(families) > 1 else "")
    missing = None
    if not charts:
        missing = needs(
            inputs,
            "These runs hold no two that differ in epsilon_high alone. Train the same with another bound, or with none "
            "(inf), and give all of them to psft report:",
            changes={"epsilon_high": math.inf} | ({} if _has_bound(inputs) else {"objective": "psft"}),
            suffix="-noclip",
        )
    return Figure(
        "epsilon_sweep",
        "The clip value: epsilon_high",
        "In the paper no clipping gives large, unsteady gradient norms; around 0.28 balances steadiness and score. "
        "Smaller holds back more tokens. The last chart has the value each run ended with.",
        charts,
        missing=missing,
        paper="9",
    )


def _has_bound(inputs: Inputs) -> bool:
    return bool(inputs.runs) and epsilon_high(inputs.runs[0]) is not None


def epsilon_name(value: float) -> str:
    return "no clipping" if math.isinf(value) else f"{value:g}"


def _charts(family: list[Group], inputs: Inputs, suffix: str) -> list[Chart]:
    names = {group.style: epsilon_name(epsilon_high(group.run) or 0.0) for group in family}
    named = [Group(f"epsilon_high = {names[g.style]}", g.style, g.runs) for g in family]
    within = Inputs(named, inputs.commands)
    charts = steps_chart(within, "entropy", f"Entropy{suffix}", "nats per token")
    charts += steps_chart(within, "grad_norm", f"Gradient norm{suffix}", "norm", may_be_log=True)
    return charts + _last_scores(within, list(names.values()), suffix)


def _last_scores(within: Inputs, names: list[str], suffix: str) -> list[Chart]:
    """What each bound ended with: the in-domain score if one was measured, else held-out NLL."""
    runs = within.runs
    scores = benchmarks.shared(runs, benchmarks.scores(runs, "in"))
    held_out = series.held_out_names(runs, "nll")

    def score(run: Run) -> Points | None:
        return benchmarks.mean_points(run, scores) if len(scores) > 1 else benchmarks.points(run, scores[0])

    def nll(run: Run) -> Points | None:
        return series.from_rows(series.held_out_rows(run, held_out[0], "nll"), "value")

    if not scores and not held_out:
        return []
    points, title, form = (score, "Last in-domain score", "percent") if scores else (nll, "Last held-out NLL", "number")
    x: list[float] = []
    ends: list[tuple[float, float, float]] = []  # mean, smallest, largest over the seeds
    used: list[str] = []
    for i, group in enumerate(within.groups):
        last = [(run.label, found[1][-1]) for run in group.runs if (found := points(run)) is not None]
        if last:
            values = [value for _, value in last]
            x.append(float(i))
            ends.append((float(np.mean(values)), min(values), max(values)))
            used += [label for label, _ in last]
    if not x:
        return []
    source = "eval.jsonl: value" if scores else f"eval.jsonl: nll of {held_out[0]}"
    is_band = len(used) > len(x)
    mean, low, high = (to_list(np.array(column)) for column in zip(*ends, strict=True))
    line = Line(
        "last value", 0, x, mean, source=source, runs=tuple(used), low=low if is_band else None,
        high=high if is_band else None,
    )  # fmt: skip
    y_label = "score" if scores else "nats per token"
    return [Chart(f"{title}{suffix}", "epsilon_high", y_label, [line], kind="bars", categories=names, y_form=form)]
