"""Arms in turn, medians of repetitions, ratios within a repetition, raw numbers kept.

A *repetition* times every arm once, in the same order (ABAB), so that whatever drifts on the machine drifts for all of
them. A ratio is formed inside each repetition and its median reported: what slows one repetition down cancels out.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
_BEGAN = time.monotonic()


@dataclass(frozen=True)
class Block:
    """One timing of one arm.

    seconds: per unit of work, which is the same for all arms of a run (a mini-batch, a pass of the head).
    details: what else was seen: tokens, parts of the time, losses, bytes.
    """

    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


Series = dict[str, list[Block]]
"""Kept blocks of every arm, in the order of the repetitions."""


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some repetitions."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


class Budget:
    """Seconds of wall time that a run may take, counted from `started` (time.monotonic)."""

    def __init__(self, seconds: float = math.inf, started: float | None = None) -> None:
        self.seconds = seconds
        self.started = time.monotonic() if started is None else started

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    def allows(self, seconds: float) -> bool:
        """Whether that many seconds more still fit."""
        return self.spent + seconds <= self.seconds


def say(line: str) -> None:
    """A line on stderr, after wall and CPU seconds of this process."""
    wall, cpu = time.monotonic() - _BEGAN, time.process_time()
    print(f"[{wall:6.1f} s, cpu {cpu:6.1f} s] {line}", file=sys.stderr, flush=True)


def interleave(
    arms: Mapping[str, Callable[[int], Block]],
    *,
    repetitions: int,
    discard: int = 1,
    budget: Budget | None = None,
    reserve: Callable[[], float] = lambda: 0.0,
    say: Callable[[str], None] = lambda line: None,
) -> Series:
    """Time all arms in turn, `discard` repetitions for nothing and then up to `repetitions`.

    Args:
        arms: by name, in the order of a repetition; called with the number of the repetition, from 0, discarded ones
            included.
        budget: no repetition begins that would overrun it, going by the longest so far; one is always kept.
        reserve: seconds of the budget that what comes afterwards needs.
        say: told a line a repetition.
    Returns:
        the kept blocks; every arm has the same number of them.
    """
    assert arms and repetitions >= 1 and discard >= 0, "nothing to measure"
    budget = budget or Budget()
    series: Series = {name: [] for name in arms}
    longest = 0.0
    for repetition in range(discard + repetitions):
        kept = len(next(iter(series.values())))
        if kept and not budget.allows(longest + reserve()):
            say(f"stopped after {kept} of {repetitions} repetitions: the time is up")
            break
        began = time.monotonic()
        blocks = {name: arm(repetition) for name, arm in arms.items()}
        longest = max(longest, time.monotonic() - began)
        shown = ", ".join(f"{name} {block.seconds:.3g}" for name, block in blocks.items())
        say(f"repetition {repetition}{' (discarded)' if repetition < discard else ''}, s: {shown}")
        if repetition >= discard:
            for name, block in blocks.items():
                series[name].append(block)
    return series


def ratio(series: Series, numerator: str, denominator: str) -> Spread:
    """T(numerator) / T(denominator), formed in each repetition."""
    pairs = zip(series[numerator], series[denominator], strict=True)
    return Spread.of([above.seconds / below.seconds for above, below in pairs])


def summarise(series: Series) -> dict[str, dict[str, Any]]:
    """Per arm: seconds, ratio to the first arm, and trained and real tokens a second where blocks count tokens.

    Padding is never counted as work done: `real_tokens` are those of the rows, `trained_tokens` those with a label.
    """
    first = next(iter(series))
    summary: dict[str, dict[str, Any]] = {}
    for name, blocks in series.items():
        summary[name] = {
            "repetitions": len(blocks),
            "seconds": asdict(Spread.of([block.seconds for block in blocks])),
            f"over_{first}": asdict(ratio(series, name, first)),
        }
        for kind in ("real_tokens", "trained_tokens"):
            if all(kind in block.details for block in blocks):
                rates = [block.details[kind] / block.seconds for block in blocks]
                summary[name][f"{kind}_per_second"] = asdict(Spread.of(rates))
    return summary


def results(
    suite: str,
    *,
    prologue: Mapping[str, Any],
    settings: Mapping[str, Any],
    series: Series,
    equality: Sequence[Mapping[str, Any]] = (),
    ratios: Mapping[str, Spread] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run leaves as JSON: `ratios` as plain medians, their spread beside them, every raw block below."""
    ratios = ratios or {}
    return {
        "schema": SCHEMA_VERSION,
        "suite": suite,
        "ratios": {name: spread.median for name, spread in ratios.items()},
        "ratio_spreads": {name: asdict(spread) for name, spread in ratios.items()},
        "settings": dict(settings),
        "equality": [dict(check) for check in equality],
        "summary": summarise(series) if series else {},
        "samples": {name: [asdict(block) for block in blocks] for name, blocks in series.items()},
        "prologue": dict(prologue),
        **(more or {}),
    }


_KEYS: dict[str, type] = {
    "schema": int, "suite": str, "ratios": dict, "ratio_spreads": dict, "settings": dict, "equality": list,
    "summary": dict, "samples": dict, "prologue": dict,
}  # fmt: skip


def check_results(content: Any) -> dict[str, Any]:
    """The content, if it is what `results` makes.

    Raises:
        ValueError: what is missing or of another kind, all of it at once.
    """
    if not isinstance(content, dict):
        raise ValueError(f"results are a JSON object, not {type(content).__name__}")
    problems = [f"'{key}' is missing" for key in _KEYS if key not in content]
    problems += [
        f"'{key}' is {type(content[key]).__name__}, not {kind.__name__}"
        for key, kind in _KEYS.items()
        if key in content and not isinstance(content[key], kind)
    ]
    if not problems and content["schema"] != SCHEMA_VERSION:
        problems.append(f"'schema' is {content['schema']}, not {SCHEMA_VERSION}")
    if not problems:
        for name, value in content["ratios"].items():
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                problems.append(f"ratio '{name}' is {value!r}")
        lengths = {name: len(blocks) for name, blocks in content["samples"].items()}
        if len(set(lengths.values())) > 1 and content["suite"] != "memory":
            problems.append(f"arms were timed unequally often: {lengths}")
    if problems:
        raise ValueError("; ".join(problems))
    return content


def write_results(path: str | Path, content: Mapping[str, Any]) -> None:
    """Check and write, complete or not at all."""
    path = Path(path)
    text = json.dumps(check_results(dict(content)), indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_results(path: str | Path) -> dict[str, Any]:
    """Read and check. Raises ValueError naming the file."""
    try:
        return check_results(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Repeat the run that wrote it.") from error
