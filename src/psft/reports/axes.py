"""Where an axis begins and ends, its ticks and their words. Shared by the page and the image files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from psft.reports.charts import Chart

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Axis:
    """low, high: ends, in data units. ticks: (place, words)."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    is_log: bool = False

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.is_log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def x_axis(chart: Chart) -> Axis:
    """Numbers from the first to the last x; for categories one place each, half a place beyond both ends."""
    if chart.categories:
        ticks = list(chart.ticks) or [(float(i), name) for i, name in enumerate(chart.categories)]
        return Axis(-0.5, len(chart.categories) - 0.5, ticks)
    values = [x for line in chart.lines for x in (*line.x, *line.smooth_x)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if chart.kind in ("path", "points") and high > low:
        pad = 0.03 * (high - low)
        low, high = low - pad, high + pad
    elif high == low:
        low, high = low - 0.5, high + 0.5
    whole = all(float(x).is_integer() for x in values)
    places = [t for t in nice_ticks(low, high, 5) if not whole or t.is_integer()]
    return Axis(low, high, [(t, number(t)) for t in places])


def y_axis(chart: Chart) -> Axis:
    """Room for every line, band and error bar; bars begin at 0."""
    values = [value for line in chart.lines for value in extent(line.y, line.low, line.high, line.error)]
    if chart.is_log:
        values = [value for value in values if value > 0]
        low, high = min(values, default=0.1), max(values, default=1.0)
        low, high = low / 1.3, high * 1.3
        return Axis(low, high, [(t, worded(t, chart.y_form)) for t in log_ticks(low, high)], is_log=True)
    low, high = min(values, default=0.0), max(values, default=1.0)
    if chart.kind == "bars":
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        pad = abs(high) * 0.1 or 0.5
        low, high = (low, high + pad) if low == 0 else (low - pad, high + pad)
    pad = 0.05 * (high - low)
    low, high = 0.0 if 0 <= low < pad else low - pad, high + pad
    return Axis(low, high, [(t, worded(t, chart.y_form)) for t in nice_ticks(low, high, 5)])


def extent(
    y: Sequence[float | None],
    low: Sequence[float | None] | None,
    high: Sequence[float | None] | None,
    error: Sequence[float | None] | None,
) -> list[float]:
    """Every height that is drawn: points, band, and both ends of error bars."""
    found = [v for values in (y, low or (), high or ()) for v in values if v is not None]
    for value, stderr in zip(y, error or (), strict=False):
        if value is not None and stderr is not None:
            found += [value - stderr, value + stderr]
    return found


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between low and high, `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((s * power for s in _STEPS if s * power >= rough * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between low and high, with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(ticks) >= 3:
            break
    every = -(-len(ticks) // 6)
    return ticks[::every] if ticks else [float(np.sqrt(low * high))]


def worded(value: float, form: str) -> str:
    """A tick or a value in words: `12.5%` or `0.125`."""
    if form == "percent":
        return f"{value * 100:.6g}%".replace("e+", "e")
    return number(value)


def number(value: float) -> str:
    """Up to six digits, thousands apart: 20,000; 0.000001 as 1e-6."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.6g}"


def shown(value: float | None, form: str) -> str:
    """A value as the page writes it: four digits, exact ones are in the data."""
    if value is None:
        return "no value"
    if form == "percent":
        return f"{value * 100:.4g}%"
    return number(float(f"{value:.4g}")) if abs(value) < 1e4 else number(value)
