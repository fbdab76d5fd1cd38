"""Scores: in-domain against entropy (paper, figure 2), over steps (figure 3), alignment tax (figure 7)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from psft.reports import benchmarks, series
from psft.reports.benchmarks import Score
from psft.reports.charts import Chart, Figure, Line, to_list, to_places
from psft.reports.figures.common import Inputs, epoch_marks, needs_command
from psft.reports.groups import Group, group_line
from psft.reports.load import Run
from psft.reports.series import Points


def against_entropy(inputs: Inputs) -> Figure:
    """Every evaluation as a point: x = entropy at its step, y = score, joined in the order of steps."""
    runs = inputs.runs
    scores = benchmarks.scores(runs, "in")
    shared = benchmarks.shared(runs, scores)
    charts = []
    if len(shared) > 1:
        title = f"Mean of {len(shared)} in-domain benchmarks"
        charts += _path_chart(inputs, title, partial(benchmarks.mean_points, among=shared))
    for score in scores:
        charts += _path_chart(inputs, benchmarks.title(score), partial(benchmarks.points, score=score))
    missing = None
    if not charts:
        where = runs[0].path if runs else "RUN"
        missing = needs_command(
            inputs, "No in-domain benchmark (AIME, AMC, MATH-500, ...) has been measured for these runs.", "eval",
            f"{where} --suite math",
        )  # fmt: skip
    return Figure(
        "score_entropy",
        "In-domain score against entropy",
        "The comparison at equal entropy: of two runs, the one whose points lie higher at the same entropy gets more "
        "score for the certainty it has taken on. Training moves to the left as entropy falls. Entropy is the "
        "training entropy over the window that ends at the evaluation.",
        charts,
        missing=missing,
        paper="2",
    )


def _path_chart(inputs: Inputs, title: str, points: Callable[[Run], Points | None]) -> list[Chart]:
    lines = []
    for group in inputs.groups:
        for run in group.runs:  # seeds as paths of their own: a band has no meaning where both axes vary
            found = points(run)
            if found is None:
                continue
            steps, values, errors = found
            entropies = np.array([series.entropy_at(run, step) for step in steps])
            known = np.isfinite(entropies)
            if known.any():
                lines.append(
                    Line(
                        run.label if len(group.runs) > 1 else group.label, group.style,
                        to_places(entropies[known]), to_list(values[known]), runs=(run.label,),
                        source="eval.jsonl: value; metrics.jsonl: entropy",
                        error=None if errors is None else to_list(errors[known]),
                        notes=[f"step {step:g}" for step in steps[known]],
                    )
                )  # fmt: skip
    return (
        [Chart(title, "training entropy, nats per token", "score", lines, kind="path", y_form="percent")]
        if lines
        else []
    )


def _score_charts(inputs: Inputs, scores: list[Score], mean_title: str) -> list[Chart]:
    runs = inputs.runs
    marks = epoch_marks(inputs.groups)
    shared = benchmarks.shared(runs, scores) if mean_title else []

    def chart(title: str, lines: list[Line | None]) -> list[Chart]:
        found = [line for line in lines if line is not None]
        return (
            [Chart(title, "optimizer step", "score", found, kind="points", marks=marks, y_form="percent")]
            if found
            else []
        )

    def line(group: Group, points: Callable[[Run], Points | None], source: str) -> Line | None:
        return group_line(group, points, inputs.budget, source=source)

    charts: list[Chart] = []
    if len(shared) > 1:
        names = ", ".join(score[0] for score in shared)
        charts += chart(
            f"{mean_title} ({len(shared)} benchmarks)",
            [
                line(g, partial(benchmarks.mean_points, among=shared), f"eval.jsonl: mean of {names}")
                for g in inputs.groups
            ],
        )
    for score in scores:
        source = f"eval.jsonl: {score[1]} of {score[0]}"
        of_score = [line(group, partial(benchmarks.points, score=score), source) for group in inputs.groups]
        charts += chart(benchmarks.title(score), of_score)
    return charts


def in_domain(inputs: Inputs) -> Figure | None:
    """In-domain scores over steps; no figure of its own where there are none, since figure 2 says what to run."""
    charts = _score_charts(inputs, benchmarks.scores(inputs.runs, "in"), "Mean in-domain score")
    if not charts:
        return None
    return Figure(
        "in_domain",
        "In-domain scores over steps",
        "Whether the model gets better at what it is taught. Bars: one standard error. With few questions the error "
        "is large: differences inside the bars say nothing.",
        charts,
    )


def out_of_domain(inputs: Inputs) -> Figure:
    charts = _score_charts(inputs, benchmarks.scores(inputs.runs, "out"), "Mean out-of-domain score")
    missing = None
    if not charts:
        where = inputs.runs[0].path if inputs.runs else "RUN"
        missing = needs_command(
            inputs, "No out-of-domain benchmark (GPQA, ARC-C, IFEval, ...) has been measured for these runs.", "eval",
            f"{where} --suite ood",
        )  # fmt: skip
    return Figure(
        "out_of_domain",
        "Out-of-domain scores over steps",
        "Whether the model keeps what it was not trained on. In the paper SFT's falls with steps, PSFT's does not. "
        "Step 0 is the untrained model; a line that ends below it has forgotten. Bars: one standard error.",
        charts,
        missing=missing,
        paper="3",
    )


def other(inputs: Inputs) -> Figure | None:
    """Benchmarks of names the registry does not know, each under its own."""
    charts = _score_charts(inputs, benchmarks.scores(inputs.runs, "other"), "")
    if not charts:
        return None
    return Figure(
        "other_scores",
        "Other scores",
        "Measured values that belong to neither group of the paper, each under the name eval.jsonl gives it. Bars: one "
        "standard error.",
        charts,
    )


def alignment_tax(inputs: Inputs) -> Figure:
    """Bars: each benchmark's last value of every group, beside the untrained model's where it was measured."""
    runs = inputs.runs
    scores = benchmarks.scores(runs, "tax")
    names = [benchmarks.title(score) for score in scores]
    lines = []
    base = _bars("before training", len(inputs.groups), runs, scores, -1, 0)
    if base is not None and any(y is not None for y in base.y):
        lines.append(base)
    for group in inputs.groups:
        bars = _bars(group.label, group.style, list(group.runs), scores, 0, -1)
        lines += [bars] if bars is not None and any(y is not None for y in bars.y) else []
    missing = None
    charts = []
    if lines:
        charts = [Chart("Alignment tax", "benchmark", "score", lines, kind="bars", categories=names, y_form="percent")]
    else:
        where = runs[0].path if runs else "RUN"
        missing = needs_command(
            inputs,
            "The alignment-tax benchmarks (GSM8K, MMLU, TruthfulQA, CMMLU, GPQA) have not been measured.",
            "eval",
            f"{where} --suite alignment-tax",
        )
    return Figure(
        "alignment_tax",
        "Alignment tax",
        "What general ability is paid for alignment: the last measured score of each run beside that before training. "
        "In the paper the loss is smaller from PSFT than from SFT. Bars: one standard error, or with several seeds "
        "smallest to largest.",
        charts,
        missing=missing,
        paper="7",
    )


def _bars(label: str, style: int, runs: list[Run], scores: list[Score], after: int, which: int) -> Line | None:
    """One value a benchmark: the runs' values at step 0 (`after` -1, `which` 0) or their last after it, averaged."""
    mean, low, high, error = [], [], [], []
    with_any = set()
    for score in scores:
        values, errors = [], []
        for run in runs:
            found = benchmarks.points(run, score)
            if found is None:
                continue
            steps, y, stderr = found
            chosen = np.flatnonzero(steps > after) if after >= 0 else np.flatnonzero(steps == 0)
            if len(chosen):
                values.append(y[chosen[which]])
                errors.append(np.nan if stderr is None else stderr[chosen[which]])
                with_any.add(run.label)
        mean.append(float(np.mean(values)) if values else np.nan)
        low.append(min(values, default=np.nan))
        high.append(max(values, default=np.nan))
        error.append(errors[0] if len(values) == 1 else np.nan)
    if not with_any:
        return None
    is_one = len(with_any) == 1
    return Line(
        label, style, list(map(float, range(len(scores)))), to_list(np.array(mean)),
        runs=tuple(run.label for run in runs if run.label in with_any), source="eval.jsonl: value",
        low=None if is_one else to_list(np.array(low)), high=None if is_one else to_list(np.array(high)),
        error=to_list(np.array(error)) if is_one and np.isfinite(error).any() else None,
    )  # fmt: skip
