"""What a figure is, before it is drawn: lines and bars as data. The page and the image files draw the same ones.

Figure   a numbered item of the report: how to read it, its charts, or what to run to get it
  Chart  one pair of axes
    Line  one run, or the runs of one setting whose seeds differ, as a line with a band
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psft.reports.sampling import running_mean, thin, thin_band

SMOOTH_FROM = 80
"""Points from which on a line also gets its running mean, drawn bold over the thin line of single steps."""
_SMOOTH_SHARE = 40  # of the points go into one mean, but never less than a window, along which numbers rise and fall
_SMOOTH_POINTS = 120


@dataclass(frozen=True)
class Line:
    """Points of one line, rising in x unless it is a path. Every number is the run folder's, or the mean of several.

    style: which colour, dash and marker; the same number is the same setting everywhere in a report.
    low, high: the band, smallest and largest over the runs of one setting. error: standard errors.
    smooth_x, smooth_y: mean of the last `smooth_width` points up to each x.
    source: file and field the numbers are from. runs: labels of the runs behind it.
    notes: a word for each point, such as its step, where x is not the step.
    """

    label: str
    style: int
    x: list[float]
    y: list[float | None]
    source: str = ""
    runs: tuple[str, ...] = ()
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    error: list[float | None] | None = None
    smooth_x: list[float] = field(default_factory=list)
    smooth_y: list[float | None] = field(default_factory=list)
    smooth_width: int = 0
    notes: list[str] = field(default_factory=list)
    num_points: int = 0

    def to_json(self) -> dict[str, Any]:
        shown = {
            "label": self.label, "style": self.style, "runs": list(self.runs), "source": self.source,
            "num_points": self.num_points or len(self.x), "x": self.x, "y": self.y, "low": self.low, "high": self.high,
            "error": self.error, "smooth_x": self.smooth_x, "smooth_y": self.smooth_y,
            "smooth_width": self.smooth_width, "notes": self.notes,
        }  # fmt: skip
        return {name: value for name, value in shown.items() if value not in (None, [], 0) or name == "style"}


@dataclass(frozen=True)
class Chart:
    """One pair of axes.

    categories: names of x = 0, 1, ...; without them x is a number. ticks: (x, words) under the axis instead of the
    categories, where those are too many to name.

    kind: lines, points (joined by thin lines, each with a marker), path (points in the order of steps), or bars.
    marks: vertical lines, (x, label, style); style None marks all runs.
    y_form: number, percent. is_log: y on a logarithmic axis.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    kind: str = "lines"
    categories: Sequence[str] = ()
    ticks: Sequence[tuple[float, str]] = ()
    marks: Sequence[tuple[float, str, int | None]] = ()
    y_form: str = "number"
    is_log: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title, "kind": self.kind, "x_label": self.x_label, "y_label": self.y_label,
            "y_form": self.y_form, "is_log": self.is_log, "categories": list(self.categories),
            "lines": [line.to_json() for line in self.lines],
        }  # fmt: skip


@dataclass(frozen=True)
class Missing:
    """Why there is nothing to show, and what to do: words, then the command that makes the data (empty: none)."""

    reason: str
    command: str = ""


@dataclass(frozen=True)
class Figure:
    """One item of the report. name: stable, names its files and its anchor. paper: the paper's figure, e.g. `1`."""

    name: str
    title: str
    how_to_read: str
    charts: Sequence[Chart] = ()
    missing: Missing | None = None
    paper: str = ""
    notes: Sequence[str] = ()
    clouds: Sequence[Any] = ()


@dataclass(frozen=True)
class Budget:
    """How many points a line may take, so that the page stays small however many runs it shows."""

    points: int = 1200

    @classmethod
    def for_runs(cls, num_lines: int) -> Budget:
        """1200 points (one a pixel and more) for a few runs, less the more lines a chart has; at least 40."""
        return cls(max(40, min(1200, 6000 // max(num_lines, 1))))


def to_places(values: np.ndarray) -> list[float]:
    """Numbers without NaN as JSON has them, whole ones without a fraction."""
    return [int(value) if value.is_integer() else value for value in values.tolist()]


def to_list(values: np.ndarray) -> list[float | None]:
    """Numbers as JSON has them: whole ones without a fraction, null for NaN."""
    return [None if value != value else int(value) if value.is_integer() else value for value in values.tolist()]


def make_line(
    label: str,
    style: int,
    x: np.ndarray,
    y: np.ndarray,
    budget: Budget,
    *,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    period: int = 1,
    **fields: Any,
) -> Line:
    """A line thinned to the budget; extremes, ends and, with a band, the band's extremes stay.

    period: steps of a window; a running mean takes whole ones. 0 = no running mean.
    """
    if low is None or high is None:
        kept = thin(y, budget.points)
        bands: dict[str, Any] = {}
    else:
        kept = thin_band(y, low, high, budget.points)
        bands = {"low": to_list(low[kept]), "high": to_list(high[kept])}
    smooth: dict[str, Any] = {}
    if len(x) >= SMOOTH_FROM and period:
        width = max(2, period, len(x) // _SMOOTH_SHARE // period * period)
        at = np.unique(np.linspace(0, len(x) - 1, min(_SMOOTH_POINTS, budget.points // 2)).round().astype(int))
        means = running_mean(y, width, at)
        smooth = {"smooth_x": to_places(x[at]), "smooth_y": to_list(means), "smooth_width": width}
    return Line(
        label=label,
        style=style,
        x=to_places(x[kept]),
        y=to_list(y[kept]),
        num_points=len(x),
        **bands,
        **smooth,
        **fields,
    )
