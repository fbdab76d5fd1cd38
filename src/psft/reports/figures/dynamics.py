"""How training went, step by step: entropy (the paper's figure 1), likelihood, gradient norm, learning rate, speed."""

from __future__ import annotations

from psft.reports import series
from psft.reports.charts import Chart, Figure, Line
from psft.reports.figures.common import NO_STEPS, Inputs, epoch_marks, step_lines, steps_chart
from psft.reports.groups import Group, group_line
from psft.reports.load import Run


def held_out_line(inputs: Inputs, group: Group, name: str, metric: str, **fields: object) -> Line | None:
    """One data set's value over steps, with its standard error."""

    def points(run: Run) -> series.Points | None:
        return series.from_rows(series.held_out_rows(run, name, metric), "value")

    source = f"eval.jsonl: {metric} of {name}"
    return group_line(group, points, inputs.budget, source=source, **fields)  # type: ignore[arg-type]


def _held_out_charts(inputs: Inputs, metric: str, words: str) -> list[Chart]:
    charts = []
    for name in series.held_out_names(inputs.runs, metric):
        found = [held_out_line(inputs, group, name, metric) for group in inputs.groups]
        lines = [line for line in found if line is not None]
        if lines:
            charts.append(
                Chart(f"{words}: {name}", "optimizer step", "nats per token", lines, kind="points",
                      marks=epoch_marks(inputs.groups))
            )  # fmt: skip
    return charts


def entropy(inputs: Inputs) -> Figure:
    charts = steps_chart(inputs, "entropy", "Entropy on the training tokens", "nats per token")
    charts += _held_out_charts(inputs, "entropy", "Entropy on held-out data")
    return Figure(
        "entropy",
        "Entropy over steps",
        "How undecided the model is about the next token. A smooth, slow fall is learning. A drop at every epoch "
        "boundary (a saw-tooth, dotted lines) is recall of rows already seen; the paper finds it for SFT and not for "
        "PSFT.",
        charts,
        missing=None if charts else NO_STEPS,
        paper="1",
    )


def likelihood(inputs: Inputs) -> Figure:
    """Training and held-out NLL in one pair of axes for one setting, side by side for several."""
    names = series.held_out_names(inputs.runs, "nll")
    charts: list[Chart] = []
    if len(inputs.groups) == 1 and names:
        (group,) = inputs.groups
        lines = [Line(**{**vars(line), "label": "training NLL"}) for line in step_lines(inputs, "nll")]
        for i, name in enumerate(names, start=1):
            line = held_out_line(inputs, group, name, "nll", label=f"held-out NLL: {name}", style=group.style + i)
            lines += [line] if line is not None else []
        charts = [
            Chart("Negative log-likelihood", "optimizer step", "nats per token", lines,
                  marks=epoch_marks(inputs.groups))
        ] if lines else []  # fmt: skip
    else:
        charts = steps_chart(inputs, "nll", "NLL of the training tokens", "nats per token")
        charts += _held_out_charts(inputs, "nll", "NLL on held-out data")
    notes = []
    if charts and not names and inputs.runs:
        notes.append(
            "No held-out NLL was measured, so overfitting cannot be seen: train with --eval_dataset NAME=SOURCE "
            "and --eval_strategy steps --eval_steps N."
        )
    return Figure(
        "likelihood",
        "Likelihood: training and held-out NLL",
        "Lower is better. Training NLL falling while held-out NLL rises is overfitting: take the checkpoint of the "
        "lowest held-out value. PSFT's own loss stays near -1 and says nothing; this is what to read instead. Bars: "
        "standard error.",
        charts,
        missing=None if charts else NO_STEPS,
        notes=notes,
    )


def gradient(inputs: Inputs) -> Figure:
    charts = steps_chart(inputs, "grad_norm", "Gradient norm before clipping", "norm", may_be_log=True)
    charts += steps_chart(inputs, "learning_rate", "Learning rate", "rate of the step", is_smoothed=False)
    charts += steps_chart(inputs, "tokens_per_second", "Speed", "trained tokens per second")
    return Figure(
        "gradient",
        "Gradient norm, learning rate and speed",
        "Norms that jump far above their usual value are unstable steps; without clipping (epsilon_high = inf) the "
        "paper finds them large and unsteady. Speed counts trained tokens over the wall time of a step, old pass "
        "included.",
        charts,
        missing=None if charts else NO_STEPS,
    )


def reference(inputs: Inputs) -> Figure | None:
    """KL to a frozen reference, for objectives that have one; no figure for others."""
    names = sorted({name for run in inputs.runs for name in run.steps if name.startswith("kl_ref_")})
    charts = [chart for name in names for chart in steps_chart(inputs, name, name, "nats per token")]
    if not charts:
        return None
    return Figure(
        "reference",
        "Penalty to the frozen reference",
        "Named by direction and estimator. Only `full` is a KL; k1, k2 and k3 on the target token are the penalty "
        "itself.",
        charts,
    )
