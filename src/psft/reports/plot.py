"""The same figures as PNG and PDF files, by matplotlib (extra `report`); the page does not need it."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from psft.reports.axes import number, worded
from psft.reports.charts import Chart, Figure, Line
from psft.reports.figures.tokens import CLOUD_TOKENS, Cloud, visible
from psft.reports.palette import COLOURS
from psft.reports.svg import slants

HOW_TO_INSTALL = "pip install 'psft[report]'"
_DASHES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (2, 2)), (0, (8, 3, 2, 3)))
_MARKERS = ("o", "s", "^", "D", "X")
_SIZE = (6.4, 3.6)  # inches, one chart
_DPI = 120
_MOST_NAMED = 12
"""Lines up to which a chart has a legend of its own; more would hide it."""


def has_matplotlib() -> bool:
    """Whether image files can be made; looks it up without importing it."""
    return importlib.util.find_spec("matplotlib") is not None


def save_figures(figures: Iterable[Figure], folder: Path) -> list[Path]:
    """Each figure that has data as NAME.png (120 dpi) and NAME.pdf (vectors); returns the paths.

    Where a process can be forked safely, that is on Linux while no other thread runs, it draws every other figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [figure for figure in figures if figure.charts or figure.clouds]
    if len(drawn) < 2 or sys.platform != "linux" or threading.active_count() > 1:
        return _save_all(drawn, folder)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        others = pool.submit(_save_all, drawn[1::2], folder)
        return [*_save_all(drawn[::2], folder), *others.result()]


def _save_all(figures: list[Figure], folder: Path) -> list[Path]:
    import matplotlib

    written: list[Path] = []
    style: Any = {
        "pdf.fonttype": 42, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 10, "text.parse_math": False, "svg.fonttype": "none",
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")  # a box stands there; the page has it
        for figure in figures:
            if figure.charts:
                written += _save(_charts(figure), folder, figure.name)
            if figure.clouds:
                written += _save(_clouds(figure.clouds), folder, figure.name)
    return written


def _save(drawn: Any, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    drawn.savefig(paths[0], dpi=_DPI, pil_kwargs={"compress_level": 3})  # 6, the default, takes three times as long
    drawn.set_layout_engine("none")  # laid out already; it costs as much as drawing
    drawn.savefig(paths[1])
    return paths


def _new(num_panels: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure as Canvas

    columns = min(num_panels, 3)
    rows = -(-num_panels // columns)
    drawn = Canvas(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(drawn.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[num_panels:]:
        spare.set_axis_off()
    return drawn, axes[:num_panels]


def _charts(figure: Figure) -> Any:
    drawn, axes = _new(len(figure.charts), _SIZE)
    for chart, ax in zip(figure.charts, axes, strict=True):
        _draw(chart, ax)
    return drawn


def _draw(chart: Chart, ax: Any) -> None:
    ax.set_title(chart.title)
    ax.set_xlabel(chart.x_label)
    ax.set_ylabel(chart.y_label)
    if chart.is_log:
        ax.set_yscale("log")
    for x, _, style in chart.marks:
        ax.axvline(x, ymin=0 if style is None else 0.96, color=_colour(style), lw=0.8, ls=":", zorder=0)
    for place, line in enumerate(chart.lines):
        if chart.kind == "bars":
            _bars(line, place, len(chart.lines), ax)
        else:
            _line(line, chart, ax)
    if chart.categories:
        ticks = list(chart.ticks) or list(enumerate(chart.categories))
        slant: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slants(chart) else {}
        ax.set_xticks([x for x, _ in ticks], [name for _, name in ticks], **slant)
    ax.yaxis.set_major_formatter(lambda value, _: worded(value, chart.y_form))
    if not chart.categories:
        ax.xaxis.set_major_formatter(lambda value, _: number(value))
    if chart.is_log:
        ax.yaxis.set_minor_formatter(lambda value, _: "")
    ax.grid(axis="y", lw=0.4, color="0.85")
    ax.set_axisbelow(True)
    if 1 < len(chart.lines) <= _MOST_NAMED or (len(chart.lines) == 1 and chart.kind != "bars"):
        ax.legend(fontsize=7, frameon=False)


def _colour(style: int | None) -> str:
    return "0.6" if style is None else COLOURS[style % len(COLOURS)]


def _line(line: Line, chart: Chart, ax: Any) -> None:
    look = {"color": _colour(line.style), "ls": _DASHES[(line.style + line.style // len(COLOURS)) % len(_DASHES)]}
    marker = _MARKERS[line.style % len(_MARKERS)] if len(line.x) <= 40 else None
    y = _numbers(line.y)
    if line.low is not None and line.high is not None:
        ax.fill_between(line.x, _numbers(line.low), _numbers(line.high), color=look["color"], alpha=0.18, lw=0)
    if line.error is not None:
        ax.errorbar(line.x, y, yerr=_numbers(line.error), fmt="none", ecolor=look["color"], elinewidth=0.8, capsize=2)
    if line.smooth_x:
        ax.plot(line.x, y, color=look["color"], lw=0.5, alpha=0.4)
        ax.plot(line.smooth_x, _numbers(line.smooth_y), lw=1.6, label=line.label, **look)
    else:
        width = 0.8 if chart.kind == "path" else 1.4
        ax.plot(line.x, y, lw=width, marker=marker, ms=4, label=line.label, **look)


def _bars(line: Line, place: int, num_lines: int, ax: Any) -> None:
    width = 0.8 / num_lines
    x = [a - 0.4 + width * (place + 0.5) for a in line.x]
    y = _numbers(line.y)
    errors: Any = None if line.error is None else _numbers(line.error)
    if line.low is not None and line.high is not None:
        low, high = _numbers(line.low), _numbers(line.high)
        errors = [[b - lo for b, lo in zip(y, low, strict=True)], [hi - b for b, hi in zip(y, high, strict=True)]]
    ax.bar(x, y, width * 0.88, yerr=errors, color=_colour(line.style), label=line.label, error_kw={"elinewidth": 0.8})


def _numbers(values: Any) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _clouds(clouds: Any) -> Any:
    """Words in rows, as the page flows them: size by how often each was clipped."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn, axes = _new(len(clouds), (6.4, 2.6))
    renderer = FigureCanvasAgg(drawn).get_renderer()
    drawn.draw_without_rendering()  # the layout has to be known before words can be measured
    for cloud, ax in zip(clouds, axes, strict=True):
        _cloud(cloud, ax, renderer)
    return drawn


def _cloud(cloud: Cloud, ax: Any, renderer: Any) -> None:
    ax.set_title(f"{cloud.run}, epoch {cloud.epoch.epoch}")
    ax.set_axis_off()
    box = ax.get_window_extent(renderer)
    x, y, height = 0.0, 0.97, 0.0
    for token in cloud.epoch.tokens[:CLOUD_TOKENS]:
        text = ax.text(
            x, y, visible(token.get("token")), fontsize=8 + 14 * cloud.size(token), va="top", transform=ax.transAxes,
            color=COLOURS[cloud.style % len(COLOURS)],
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        width, tall = extent.width / box.width, extent.height / box.height
        if x > 0 and x + width > 1:
            x, y, height = 0.0, y - height - 0.02, 0.0
            text.set_position((x, y))
        if y - tall < 0:
            text.remove()
            break
        x, height = x + width + 0.02, max(height, tall)
