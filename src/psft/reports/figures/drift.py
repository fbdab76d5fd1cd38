"""What is being forgotten: the retention probe's drift over steps, over all its prompts and for each kind of them."""

from __future__ import annotations

from psft.reports import series
from psft.reports.charts import Chart, Figure, Line
from psft.reports.figures.common import Inputs, epoch_marks, needs
from psft.reports.groups import Group, group_line


def _line(inputs: Inputs, group: Group, kind: str, **fields: object) -> Line | None:
    source = f"probe.jsonl: drift_nats_per_token of {kind}"
    return group_line(group, lambda run: series.drift(run, kind), inputs.budget, source=source, **fields)  # type: ignore[arg-type]


def drift(inputs: Inputs) -> Figure:
    rows = (row for run in inputs.runs for row in run.probes)
    kinds = [kind for kind in dict.fromkeys(str(row.get("group")) for row in rows) if kind != series.ALL_PROMPTS]
    marks = epoch_marks(inputs.groups)

    def chart(title: str, lines: list[Line | None]) -> list[Chart]:
        found = [line for line in lines if line is not None]
        return [Chart(title, "optimizer step", "nats per token", found, kind="points", marks=marks)] if found else []

    charts = chart("All probe prompts", [_line(inputs, group, series.ALL_PROMPTS) for group in inputs.groups])
    if len(inputs.groups) == 1:
        (group,) = inputs.groups
        lines = [_line(inputs, group, kind, label=kind, style=i) for i, kind in enumerate(kinds)]
        charts += chart("By kind of prompt", lines)
    else:
        for kind in kinds:
            charts += chart(f"Prompts of kind: {kind}", [_line(inputs, group, kind) for group in inputs.groups])
    missing = None
    if not charts:
        missing = needs(
            inputs,
            "No retention probe was recorded (probe.jsonl), so forgetting was not measured. The probe asks the model "
            "it started from; train with:",
            changes={"probe_every": 50},
            suffix="-probe",
        )
    measured = [row["step"] for run in inputs.runs for row in run.probes]
    notes = (
        ["So far only the untrained model has been asked, where drift is 0."] if charts and not any(measured) else []
    )
    return Figure(
        "drift",
        "Drift on general prompts (retention probe)",
        "How far the model has moved from where it began, on answers that have nothing to do with the training data: "
        "an estimate of KL(base || current). 0 is nothing forgotten; bars are one standard error. Values below 0 are "
        "noise.",
        charts,
        missing=missing,
        notes=notes,
    )
