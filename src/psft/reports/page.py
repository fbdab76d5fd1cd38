"""The report as one HTML file: opens from disk, asks no network, and holds its own numbers as JSON.

Text from run folders reaches the page through Jinja's escaping or as JSON without `<`, `>`, `&`, so that no token, name
or path can become markup; the content security policy lets no script run but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

import psft
from psft.reports import palette, provenance, svg
from psft.reports.advice import Advice
from psft.reports.axes import shown, x_axis, y_axis
from psft.reports.charts import Chart, Figure
from psft.reports.figures.tokens import CLOUD_TOKENS, TABLE_ROWS, visible
from psft.reports.groups import BAND, Group
from psft.reports.load import Run
from psft.reports.score_cells import SIGNIFICANT, Cell, Difference, ScoreTable
from psft.reports.verdict import THRESHOLDS, Finding

SCHEMA = 1
"""Of the page's data; a number that rises when a field changes its meaning."""
MOST_TABLE_POINTS = 200
"""Points of a chart up to which its table is in the page; the script fills in longer ones when they are opened."""
SYMBOLS = {"good": "\u2713", "warn": "!", "bad": "\u2717", "unknown": "?"}


@dataclass(frozen=True)
class Content:
    """All that a page says.

    findings, advice: one a run, by label. refresh_s: while the runs go on; None = a last page.
    """

    groups: list[Group]
    sections: Mapping[str, list[Figure]]
    score_tables: list[ScoreTable]
    findings: Mapping[str, Mapping[str, Finding]]
    advice: Mapping[str, Advice]
    written_at: str
    refresh_s: float | None = None
    has_images: bool = False

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


def render(content: Content) -> str:
    """The page as HTML text."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": visible, "value": shown}
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    runs = content.runs
    return environment.from_string(_resource("page.html")).render(
        content=content,
        runs=runs,
        title=_title(runs),
        version=psft.__version__,
        styles={run.label: group.style for group in content.groups for run in group.runs},
        lowest={"learned": _lowest(content, "learned", "last"), "forgot": _lowest(content, "forgot", "drift")},
        has_seeds=any(len(group.runs) > 1 for group in content.groups),
        band=BAND,
        settings=provenance.settings(runs),
        environment=provenance.environment(runs),
        data=provenance.data_reports(runs),
        most_columns=provenance.MOST_COLUMNS,
        thresholds=THRESHOLDS,
        symbols=SYMBOLS,
        significant=f"{SIGNIFICANT:g}",
        score=score,
        change=change,
        about=about,
        cloud_tokens=CLOUD_TOKENS,
        table_rows=TABLE_ROWS,
        svg=svg,
        table=table,
        css=Markup(_resource("page.css").replace("/* COLOURS */", colours_css())),
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'",
        json=Markup(embed(data(content))),
    )


def data(content: Content) -> dict[str, Any]:
    """Everything the page shows, with exact numbers: what a program reads, and the script's source."""
    return {
        "schema": SCHEMA,
        "psft": psft.__version__,
        "written_at": content.written_at,
        "refresh_s": content.refresh_s,
        "runs": [
            {
                "label": run.label,
                "path": run.path,
                "exit_reason": run.exit_reason,
                "num_steps": run.num_steps,
                "findings": {name: finding.to_json() for name, finding in content.findings[run.label].items()},
                "next": vars(content.advice[run.label]),
                "alerts": [vars(alert) for alert in run.alerts],
                "notes": run.notes,
            }
            for run in content.runs
        ],
        "groups": [{"label": g.label, "style": g.style, "runs": [run.label for run in g.runs]} for g in content.groups],
        "score_tables": {table.name: table.to_json() for table in content.score_tables},
        "figures": {figure.name: _figure(figure) for figures in content.sections.values() for figure in figures},
        "settings": provenance.settings(content.runs).to_json(),
        "data": provenance.data_reports(content.runs).to_json(),
        "environment": provenance.environment(content.runs).to_json(),
    }


def _figure(figure: Figure) -> dict[str, Any]:
    return {
        "title": figure.title,
        "paper": figure.paper,
        "charts": [{**chart.to_json(), **_axes(chart)} for chart in figure.charts],
        "clouds": [cloud.to_json() for cloud in figure.clouds],
        "missing": None if figure.missing is None else vars(figure.missing),
        "notes": list(figure.notes),
    }


def _axes(chart: Chart) -> dict[str, Any]:
    x, y = x_axis(chart), y_axis(chart)
    return {"x_ends": [x.low, x.high], "y_ends": [y.low, y.high]}


def embed(value: Any) -> str:
    """JSON that may stand inside a script element: no character in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table(chart: Chart) -> dict[str, Any]:
    """The chart's data as a table: every point if they are few, else the ends and extremes of each line."""
    form = chart.y_form
    if sum(len(line.x) for line in chart.lines) > MOST_TABLE_POINTS:
        head = ["line", "points", "first", "last", "lowest", "highest"]
        return {"head": head, "rows": [_ends(chart, line) for line in chart.lines], "is_whole": False}
    rows = []
    has_error = any(line.error is not None for line in chart.lines)
    has_band = any(line.low is not None for line in chart.lines)
    for line in chart.lines:
        for i, y in enumerate(line.y):
            row = [line.label, svg.at(chart, line, i)]
            row += [shown(line.x[i], "number")] if chart.kind == "path" else []
            row += [shown(y, form)]
            row += [shown(line.error[i], form) if line.error is not None else ""] if has_error else []
            row += (
                [f"{shown(line.low[i], form)} to {shown(line.high[i], form)}" if line.low and line.high else ""]
                if has_band
                else []
            )
            rows.append(row)
    head = ["line", chart.x_label if chart.kind != "path" else "at"] + ([chart.x_label] if chart.kind == "path" else [])
    head += [chart.y_label] + (["standard error"] if has_error else []) + (["smallest to largest"] if has_band else [])
    return {"head": head, "rows": rows, "is_whole": True}


def score(cell: Cell) -> str:
    """A score in points with its standard error, as `22.1 ± 1.3`."""
    return f"{100 * cell.value:.1f}" + ("" if cell.stderr is None else f" ± {100 * cell.stderr:.1f}")


def change(difference: Difference) -> str:
    """A difference in points with its standard error."""
    error = "" if difference.stderr is None else f" ± {100 * difference.stderr:.1f}"
    return f"{100 * difference.value:+.1f}".replace("-", "\u2212") + error


def about(cell: Cell) -> str:
    """What a cell is made of, for who points at it."""
    said = [f"n = {cell.n:,}"] if cell.n is not None else []
    said += [f"avg@{cell.k}"] if cell.k is not None and cell.k > 1 else []
    said += [f"step {', '.join(map(str, cell.steps))}"] if cell.steps else []
    if cell.low is not None and cell.high is not None:
        said.append(f"{cell.num_runs} runs from {100 * cell.low:.1f} to {100 * cell.high:.1f}")
    if cell.difference is not None and cell.difference.p_value is not None:
        found = cell.difference
        said.append(f"difference {found.test}, p = {found.p_value:.2g}, after Holm {found.p_holm or 0:.2g}")
    return "; ".join(said)


def _ends(chart: Chart, line: Any) -> list[str]:
    form = chart.y_form
    points = [(i, y) for i, y in enumerate(line.y) if y is not None]
    if not points:
        return [line.label, str(line.num_points), "", "", "", ""]
    chosen = [points[0], points[-1], min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])]
    return [line.label, f"{line.num_points:,}", *(f"{shown(y, form)} ({svg.at(chart, line, i)})" for i, y in chosen)]


def colours_css() -> str:
    """The palette as custom properties, light and dark."""

    def properties(colours: tuple[str, ...]) -> str:
        return "".join(f"--c{i}:{colour};" for i, colour in enumerate(colours))

    light, dark = properties(palette.COLOURS), properties(palette.DARK_COLOURS)
    uses = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(len(palette.COLOURS)))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{uses}"


def _lowest(content: Content, name: str, key: str) -> float | None:
    """The smallest of a number over the runs that measured it on held-out data or by the probe."""
    found = [findings[name].values for findings in content.findings.values()]
    values = [value[key] for value in found if key in value and (key != "last" or "best" in value)]
    return min(values) if len(set(values)) > 1 else None


def _title(runs: list[Run]) -> str:
    if len(runs) == 1:
        return f"psft report: {runs[0].label}"
    return f"psft report: {len(runs)} runs"


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
