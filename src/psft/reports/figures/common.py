"""What the figures share: their inputs, a chart over steps, epoch boundaries, and what to run where data is missing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from psft.reports import series
from psft.reports.charts import Budget, Chart, Line, Missing
from psft.reports.groups import Group, group_line
from psft.reports.load import Run
from psft.reports.rerun import rerun

MOST_EPOCH_MARKS = 24
_LOG_FROM = 100.0
"""Largest over typical value from which on a positive axis is logarithmic."""


NO_CLIP = "None of these runs has an objective with a clip, so there is nothing to show. Train with one:"
NO_STEPS = Missing("No optimizer step has been recorded yet.")


@dataclass(frozen=True)
class Inputs:
    """groups: the runs, those of one setting together. commands: the names of the psft commands there are."""

    groups: list[Group]
    commands: Collection[str]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def budget(self) -> Budget:
        return Budget.for_runs(len(self.groups))


def step_lines(inputs: Inputs, field: str, *, is_smoothed: bool = True) -> list[Line]:
    """One line a group of a field of metrics.jsonl."""
    source = f"metrics.jsonl: {field}"
    found = [
        group_line(
            g,
            lambda run: series.of_steps(run, field),
            inputs.budget,
            source=source,
            period=is_smoothed * series.steps_a_window(g.run),
        )
        for g in inputs.groups
    ]
    return [line for line in found if line is not None]


def steps_chart(
    inputs: Inputs,
    field: str,
    title: str,
    y_label: str,
    *,
    y_form: str = "number",
    may_be_log: bool = False,
    is_smoothed: bool = True,
) -> list[Chart]:
    """The chart of a field over steps with its epoch boundaries; none where no run has the field."""
    lines = step_lines(inputs, field, is_smoothed=is_smoothed)
    if not lines:
        return []
    is_log = may_be_log and wants_log(lines)
    return [
        Chart(title, "optimizer step", y_label, lines, marks=epoch_marks(inputs.groups), y_form=y_form, is_log=is_log)
    ]


def wants_log(lines: list[Line]) -> bool:
    """Whether the values are all positive and the largest is far above the usual."""
    values = np.array([y for line in lines for y in line.y if y is not None])
    return len(values) > 0 and values.min() > 0 and values.max() > _LOG_FROM * np.median(values)


def epoch_ends(run: Run) -> list[tuple[float, int]]:
    """(last step, number) of every epoch that was followed by another. The step that ends epoch 1 has epoch 1.0."""
    epochs, steps = run.column("epoch"), run.column("step")
    known = np.isfinite(epochs)
    if not known.any():
        return []
    number = np.ceil(epochs[known] - 1e-9).astype(int)
    last = np.flatnonzero(number[1:] != number[:-1])
    return [(float(steps[known][i]), int(number[i])) for i in last]


def epoch_marks(groups: list[Group]) -> list[tuple[float, str, int | None]]:
    """Where epochs end: for all runs at once if they agree, else each in its run's colour. Thinned out if too many."""
    ends = {group.style: epoch_ends(group.run) for group in groups}
    sets = [found for found in ends.values() if found]
    longest = max(sets, key=len, default=[])
    if all(found == longest[: len(found)] for found in sets):
        every = -(-len(longest) // MOST_EPOCH_MARKS) or 1
        return [(step, f"epoch {number} ends", None) for step, number in longest[::every]]
    most = max(1, MOST_EPOCH_MARKS // max(len(sets), 1))
    return [
        (step, f"epoch {number} ends", style)
        for style, found in ends.items()
        for step, number in found[:: -(-len(found) // most) or 1]
    ]


def needs(inputs: Inputs, reason: str, *, changes: dict[str, object], suffix: str) -> Missing:
    """What is missing and the first run's own command with the settings that record it."""
    begun = [run for run in inputs.runs if run.num_steps]
    return Missing(reason, rerun(begun[0], changes, suffix=suffix)) if begun else NO_STEPS


def needs_command(inputs: Inputs, reason: str, name: str, arguments: str) -> Missing:
    """What is missing and the command of psft that makes it; says so where this version has no such command."""
    if name in inputs.commands:
        return Missing(reason, f"psft {name} {arguments}")
    return Missing(f"{reason} That takes psft {name}, which this version does not have yet.")
