"""A chart as SVG that fits any width: places are percentages, text keeps its size, lines their thickness.

The plot is an `svg` without viewBox, so percentages of it are data and `px` are pixels. Lines are drawn in an inner
`svg` of 1000 x 1000 that stretches, with strokes that do not. Colours, dashes and dark mode come from the style sheet.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from psft.reports.axes import Axis, number, shown, x_axis, y_axis
from psft.reports.charts import Chart, Line

NUM_COLOURS, NUM_DASHES, NUM_MARKERS = 8, 4, 5
MARKERS_UP_TO = 40
"""Points of a line up to which each has a marker."""
_MOST_DESCRIBED = 8
_MOST_BAR_VALUES = 6
_UNIT = 1000.0


def classes(style: int) -> str:
    """Colour and dash of a setting: eight colours, and a dash that changes with every one of them."""
    return f"c{style % NUM_COLOURS} d{(style + style // NUM_COLOURS) % NUM_DASHES}"


def marker(style: int) -> str:
    """The symbol of a setting's points, defined once on the page."""
    return f"m{style % NUM_MARKERS}"


def draw(chart: Chart, name: str) -> Markup:
    """The plot of a chart. name: its place in the page's data."""
    x, y = x_axis(chart), y_axis(chart)
    parts = [_grid(x, y, slants(chart)), _marks(chart, x)]
    if chart.kind == "bars":
        parts.append(_bars(chart, x, y))
    else:
        paths = [_paths(line, x, y, chart) for line in chart.lines]
        inner = Markup('<svg class="data" viewBox="0 0 1000 1000" preserveAspectRatio="none">{}</svg>')
        parts += [inner.format(Markup("").join(paths)), *(_markers(line, x, y) for line in chart.lines)]
    return Markup(
        '<svg class="plot" role="img" tabindex="0" aria-label="{}" data-chart="{}">{}'
        '<line class="cross" y1="0" y2="100%" visibility="hidden"/></svg>'
    ).format(describe(chart), name, Markup("").join(parts))


def slants(chart: Chart) -> bool:
    """Whether the names of categories are too long to stand side by side on a phone."""
    return not chart.ticks and sum(len(name) + 2 for name in chart.categories) > 36


def describe(chart: Chart) -> str:
    """The chart in words, for who cannot see it."""
    lines = [_described(line, chart) for line in chart.lines[:_MOST_DESCRIBED]]
    if len(chart.lines) > _MOST_DESCRIBED:
        lines.append(f"and {len(chart.lines) - _MOST_DESCRIBED} more, in the table below.")
    return f"{chart.title}: {chart.y_label} against {chart.x_label}. " + " ".join(lines)


def _described(line: Line, chart: Chart) -> str:
    points = [(i, value) for i, value in enumerate(line.y) if value is not None]
    if not points:
        return f"{line.label}: no values."
    form = chart.y_form
    if chart.kind == "bars":
        return f"{line.label}: " + ", ".join(f"{at(chart, line, i)} {shown(value, form)}" for i, value in points) + "."
    (first, start), (last, end) = points[0], points[-1]
    lowest, highest = min(value for _, value in points), max(value for _, value in points)
    return (
        f"{line.label}: {shown(start, form)} at {at(chart, line, first)}, {shown(end, form)} at "
        f"{at(chart, line, last)}, lowest {shown(lowest, form)}, highest {shown(highest, form)}."
    )


def at(chart: Chart, line: Line, i: int) -> str:
    """The x of a point in words: `step 20`, a category's name, or its own note."""
    if line.notes:
        return line.notes[i]
    if chart.categories:
        return chart.categories[int(line.x[i])]
    unit = "step " if chart.x_label == "optimizer step" else f"{chart.x_label} "
    return unit + number(line.x[i])


def swatch(line: Line, chart: Chart) -> Markup:
    """The line's sample for a legend."""
    if chart.kind == "bars":
        box = Markup('<rect class="bar" x="4" y="1" width="20" height="10"/>')
        return Markup('<svg class="swatch {}" aria-hidden="true">{}</svg>').format(classes(line.style), box)
    return Markup(
        '<svg class="swatch {}" aria-hidden="true"><line class="line" x1="0" x2="28" y1="6" y2="6"/>'
        '<use href="#{}" x="14" y="6"/></svg>'
    ).format(classes(line.style), marker(line.style))


def _grid(x: Axis, y: Axis, is_slanted: bool) -> Markup:
    parts = []
    for value, words in y.ticks:
        place = _percent(1 - y.share(value))
        parts.append(
            Markup(
                '<line class="grid" x2="100%" y1="{0}" y2="{0}"/>'
                '<text class="tick y" y="{0}" dx="-8" dy="0.32em">{1}</text>'
            ).format(place, words)
        )
    for value, words in x.ticks:
        place = _percent(x.share(value))
        if is_slanted:
            parts.append(
                Markup(
                    '<svg class="slant" x="{}" y="100%">'
                    '<text class="tick y" transform="rotate(-35)" dy="1.1em">{}</text></svg>'
                ).format(place, words)
            )
            continue
        parts.append(Markup('<text class="tick x" x="{}" y="100%" dy="1.5em">{}</text>').format(place, words))
    parts.append(Markup('<line class="axis" x2="100%" y1="100%" y2="100%"/>'))
    return Markup("").join(parts)


def _marks(chart: Chart, x: Axis) -> Markup:
    """Epoch boundaries: lines over the whole height for all runs, else ticks at the top in the run's colour."""
    parts = []
    for value, words, style in chart.marks:
        if not x.low <= value <= x.high:
            continue
        form = (
            '<line class="epoch" x1="{0}" x2="{0}" y2="100%"><title>{1}</title></line>'
            if style is None
            else '<line class="epoch own {2}" x1="{0}" x2="{0}" y2="9"><title>{1}</title></line>'
        )
        parts.append(Markup(form).format(_percent(x.share(value)), words, "" if style is None else classes(style)))
    return Markup("").join(parts)


def _paths(line: Line, x: Axis, y: Axis, chart: Chart) -> Markup:
    parts = []
    kind = classes(line.style)
    if line.low is not None and line.high is not None:
        parts.append(Markup('<path class="band {}" d="{}"/>').format(kind, _band(line, x, y)))
    if line.error is not None:
        parts.append(
            Markup('<path class="error {} {}" d="{}"/>').format(
                "faint" if chart.kind == "path" else "", kind, _errors(line, x, y)
            )
        )
    is_raw = bool(line.smooth_x)
    weight = "raw" if is_raw else "thin" if chart.kind == "path" else "line"
    parts.append(Markup('<path class="{} {}" d="{}"/>').format(weight, kind, _path(line.x, line.y, x, y)))
    if is_raw:
        parts.append(Markup('<path class="line {}" d="{}"/>').format(kind, _path(line.smooth_x, line.smooth_y, x, y)))
    return Markup("").join(parts)


def _path(xs: Sequence[float], ys: Sequence[float | None], x: Axis, y: Axis) -> str:
    """Moves and lines, broken where there is no value."""
    parts: list[str] = []
    is_open = False
    for a, b in zip(xs, ys, strict=True):
        if b is None or (y.is_log and b <= 0):
            is_open = False
            continue
        parts.append(f"{'L' if is_open else 'M'}{_place(x.share(a))} {_place(1 - y.share(b))}")
        is_open = True
    return "".join(parts)


def _band(line: Line, x: Axis, y: Axis) -> str:
    """One closed outline for each stretch without gaps."""
    assert line.low is not None and line.high is not None
    parts: list[str] = []
    stretch: list[tuple[float, float, float]] = []
    for a, low, high in [*zip(line.x, line.low, line.high, strict=True), (0.0, None, None)]:
        if low is not None and high is not None and not (y.is_log and low <= 0):
            stretch.append((a, low, high))
            continue
        if stretch:
            upper = [f"{_place(x.share(a))} {_place(1 - y.share(h))}" for a, _, h in stretch]
            lower = [f"{_place(x.share(a))} {_place(1 - y.share(lo))}" for a, lo, _ in reversed(stretch)]
            parts.append("M" + "L".join([*upper, *lower]) + "Z")
        stretch = []
    return "".join(parts)


def _errors(line: Line, x: Axis, y: Axis) -> str:
    parts = []
    for a, b, error in zip(line.x, line.y, line.error or (), strict=True):
        if b is not None and error is not None and not (y.is_log and b - error <= 0):
            parts.append(f"M{_place(x.share(a))} {_place(1 - y.share(b - error))}V{_place(1 - y.share(b + error))}")
    return "".join(parts)


def _markers(line: Line, x: Axis, y: Axis) -> Markup:
    if len(line.x) > MARKERS_UP_TO:
        return Markup("")
    uses = [
        Markup('<use href="#{}" x="{}" y="{}"/>').format(
            marker(line.style), _percent(x.share(a)), _percent(1 - y.share(b))
        )
        for a, b in zip(line.x, line.y, strict=True)
        if b is not None and not (y.is_log and b <= 0)
    ]
    return Markup('<g class="markers {}">{}</g>').format(classes(line.style), Markup("").join(uses))


def _bars(chart: Chart, x: Axis, y: Axis) -> Markup:
    """Groups of bars, one group a category, one bar a line; error bars or the range of seeds on top."""
    parts = []
    width = 0.8 / max(len(chart.lines), 1)
    ground = y.share(0.0)
    for place, line in enumerate(chart.lines):
        kind = classes(line.style) if line.style >= 0 else "c0"
        for i, (a, b) in enumerate(zip(line.x, line.y, strict=True)):
            if b is None:
                continue
            left, right = (x.share(a - 0.4 + width * (place + side)) for side in (0.06, 0.94))
            top, bottom = 1 - max(y.share(b), ground), 1 - min(y.share(b), ground)
            parts.append(
                Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="{}"/>').format(
                    kind, _percent(left), _percent(top), _percent(right - left), _percent(bottom - top)
                )
            )
            if len(chart.lines) == 1 and len(chart.categories) <= _MOST_BAR_VALUES:
                parts.append(
                    Markup('<text class="tick x" x="{}" y="{}" dx="1.6em" dy="-0.4em">{}</text>').format(
                        _percent((left + right) / 2), _percent(top), shown(b, chart.y_form)
                    )
                )
            ends = _bar_range(line, i, b)
            if ends is not None:
                middle = _percent((left + right) / 2)
                low, high = (_percent(1 - y.share(end)) for end in ends)
                parts.append(
                    Markup('<line class="whisker" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(middle, low, high)
                )
    return Markup("").join(parts)


def _bar_range(line: Line, i: int, value: float) -> tuple[float, float] | None:
    error = line.error[i] if line.error is not None else None
    if error is not None:
        return value - error, value + error
    low, high = (line.low or [None] * len(line.y))[i], (line.high or [None] * len(line.y))[i]
    return (low, high) if low is not None and high is not None and high > low else None


def _place(share: float) -> str:
    return f"{share * _UNIT:.1f}".removesuffix(".0")


def _percent(share: float) -> str:
    return f"{share * 100:.2f}%"
