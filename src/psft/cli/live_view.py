"""What a person sees while a run trains: curves in the terminal, or one plain line now and then where there is none."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from psft.trainers.durability import Durability

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVES = (
    ("nll", "NLL", "nats/token", "{:.3f}"),
    ("entropy", "entropy", "nats/token", "{:.3f}"),
    ("clip_fraction", "clipped", "of tokens", "{:.2%}"),
    ("reward_mean", "reward", "mean", "{:.3f}"),
    ("kept_group_share", "groups kept", "of prompts", "{:.1%}"),
    ("rewards_margin", "margin", "of rewards", "{:.4f}"),
    ("rewards_accuracy", "ranked right", "of pairs", "{:.1%}"),
    ("drift_nats_per_token", "drift", "nats/token", "{:.4f}"),
    ("grad_norm", "gradient", "norm", "{:.3g}"),
)
"""Metric, name, unit, form: of metrics.jsonl and, for drift, of probe.jsonl."""
_MOST_POINTS = 4096  # kept of a curve; beyond it neighbours are joined


def sparkline(values: Sequence[float], width: int) -> str:
    """The curve as at most `width` block characters, each the mean of its share of the values; lowest to highest."""
    shown = [v for v in values if math.isfinite(v)]
    if not shown or width < 1:
        return ""
    size = max(1, math.ceil(len(shown) / width))
    means = [sum(shown[i : i + size]) / len(shown[i : i + size]) for i in range(0, len(shown), size)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[0] * len(means)
    return "".join(_BLOCKS[min(int((v - low) / (high - low) * len(_BLOCKS)), len(_BLOCKS) - 1)] for v in means)


class LiveView:
    """Takes the rows a run records (`row`) and shows them: `render` for a terminal, `line` for a file.

    Args:
        max_steps: optimizer steps of the run.
        every: steps between plain lines.
    """

    def __init__(self, max_steps: int, every: int = 10) -> None:
        self.max_steps = max_steps
        self.every = max(every, 1)
        self.step = 0
        self.held_out: dict[str, float] = {}
        self._curves: dict[str, list[float]] = {name: [] for name, *_ in _CURVES}
        self._first: dict[str, float] = {}
        self._last: dict[str, Any] = {}
        self._started = time.monotonic()
        self._first_step: int | None = None

    def row(self, kind: str, row: Mapping[str, Any]) -> None:
        """Take in a row. kind: the file it goes to, without its ending."""
        if kind == "eval":
            if row.get("value") is not None:
                self.held_out[f"{row['benchmark']} {row['metric']}"] = row["value"]
            return
        if kind == "probe" and row.get("group") != "all":
            return
        self.step = max(self.step, int(row["step"]))
        if kind == "metrics" and self._first_step is None:
            self._first_step, self._started = self.step, time.monotonic()
        for name, curve in self._curves.items():
            value = row.get(name)
            if value is None:
                continue
            self._first.setdefault(name, value)
            curve.append(value)
            if len(curve) > _MOST_POINTS:
                curve[:] = [(a + b) / 2 for a, b in zip(curve[::2], curve[1::2], strict=False)]
        self._last.update((name, value) for name, value in row.items() if value is not None)

    def is_line_due(self, kind: str, row: Mapping[str, Any]) -> bool:
        """Whether a plain line should follow this row."""
        step = int(row.get("step", 0))
        return kind == "metrics" and (step == 1 or step % self.every == 0 or step >= self.max_steps)

    def line(self) -> str:
        """Where the run is, in one line of plain text."""
        parts = [f"step {self.step}/{self.max_steps}"]
        parts += [f"{label} {form.format(self._last[name])}" for name, label, _, form in _CURVES if name in self._last]
        if "learning_rate" in self._last:
            parts.append(f"lr {self._last['learning_rate']:.2g}")
        if "tokens_per_second" in self._last:
            parts.append(f"{self._last['tokens_per_second']:,.0f} tokens/s")
        left = self._seconds_left()
        return "  ".join([*parts, f"{_clock(left)} left"] if left else parts)

    def render(self, width: int) -> RenderableType:
        """The same as curves."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self._seconds_left()
        head = Table.grid(padding=(0, 1))
        head.add_row(
            f"step {self.step}/{self.max_steps}",
            ProgressBar(total=max(self.max_steps, 1), completed=self.step, width=max(width - 58, 8)),
            f"{self._last.get('tokens_per_second', 0):,.0f} tokens/s",
            f"{_clock(left)} left" if left else "",
        )
        table = Table.grid(padding=(0, 1))
        for name, label, unit, form in _CURVES:
            if name in self._first:
                curve = sparkline(self._curves[name], max(width - 52, 8))
                now = form.format(self._last[name])
                table.add_row(label, Text(curve), f"{form.format(self._first[name])} > {now}", Text(unit, style="dim"))
        parts: list[RenderableType] = [head, table]
        if self.held_out:
            held = "   ".join(f"{name} {value:.3f}" for name, value in self.held_out.items())
            parts.append(Text(f"held out: {held}", style="dim", overflow="ellipsis", no_wrap=True))
        return Group(*parts)

    def _seconds_left(self) -> float | None:
        done = self.step - (self._first_step or 0)
        if self._first_step is None or done < 1 or self.step >= self.max_steps:
            return None
        return (time.monotonic() - self._started) / done * (self.max_steps - self.step)


@contextlib.contextmanager
def live_view(trainer: Durability, console: Console | None = None) -> Iterator[None]:
    """Show the run of `trainer` while the body trains it. Only the first rank shows anything, and nothing where
    `disable_tqdm` asks for quiet."""
    from rich.console import Console
    from transformers import PrinterCallback, ProgressCallback

    if trainer.args.disable_tqdm or not trainer.is_world_process_zero():
        yield
        return
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    console = console or Console()
    view: LiveView | None = None
    with _live_area(console) if console.is_terminal else contextlib.nullcontext() as live:

        def shown(kind: str, row: Mapping[str, Any]) -> None:
            nonlocal view
            if view is None or view.max_steps != trainer.state.max_steps:
                previous, view = view, LiveView(trainer.state.max_steps, every=int(trainer.args.logging_steps or 10))
                view.held_out = {} if previous is None else previous.held_out
            view.row(kind, row)
            if live is not None:
                live.update(view.render(console.width))
            elif view.is_line_due(kind, row):
                print(view.line(), flush=True)

        trainer.recorder.listeners.append(shown)
        try:
            yield
        finally:
            trainer.recorder.listeners.remove(shown)


@contextlib.contextmanager
def _live_area(console: Console) -> Iterator[Any]:
    """A part of the terminal that is drawn over; what is logged meanwhile appears above it."""
    from rich.live import Live

    with Live(console=console, refresh_per_second=4) as live:
        handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
        streams = [handler.stream for handler in handlers]
        for handler in handlers:
            handler.setStream(sys.stderr)  # rich has put a stream there that writes above the area
        try:
            yield live
        finally:
            for handler, stream in zip(handlers, streams, strict=True):
                handler.setStream(stream)


def _clock(seconds: float | None) -> str:
    minutes, rest = divmod(int(seconds or 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
