"""Rules a person gives for a run, such as `drift>0.05`: read, checked, and asked after every row of numbers.

    METRIC OP NUMBER [for N]        OP is > < >= <=;  "for 3" means three measurements in a row

A metric is a number of metrics.jsonl (`nll`, `entropy`, `clip_fraction`, `grad_norm`, ...), `drift` of the retention
probe, or NAME_METRIC of eval.jsonl (`heldout_nll`). A rule looks only at rows that hold its metric.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from psft.errors import RequestError
from psft.runs.rows import MetricsRow

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"\s*([A-Za-z_][\w.\-/]*)\s*(>=|<=|>|<)\s*([^\s]+)\s*(?:for\s+(\d+))?\s*")
_NOT_NUMBERS = {"stage", "log_ratio_histogram", "tokens_per_second", "peak_memory_bytes"}  # the last two: other per rank
STEP_METRICS = tuple(sorted(set(MetricsRow.__annotations__) - _NOT_NUMBERS))
"""What a rule can ask of every optimizer step."""
DRIFT = "drift"
"""The probe's `drift_nats_per_token` over all its prompts."""


@dataclass(frozen=True)
class Rule:
    """`metric` compared with `bound`, met once that held in `times` measurements in a row."""

    metric: str
    comparison: str
    bound: float
    times: int = 1

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{self.bound:g}" + (f" for {self.times}" if self.times > 1 else "")

    def holds(self, value: float | None) -> bool:
        """Whether one measurement is on the wrong side; a value that is null (not finite) is neither."""
        return value is not None and _OPERATORS[self.comparison](value, self.bound)


def parse_rule(text: str, *, setting: str, measured: Iterable[str] = ()) -> Rule:
    """The rule that `text` writes down.

    Args:
        setting: the setting it was given to, for the message.
        measured: further metrics this run measures, such as `heldout_nll`.
    Raises:
        RequestError: not of the form, an unknown metric (the nearest is named), or a bound that is no number.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise RequestError(
            f"{setting}={text!r} is no rule. Write METRIC>NUMBER or METRIC<NUMBER, e.g. 'drift>0.05' or "
            "'clip_fraction<0.01 for 24'."
        )
    metric, comparison, number, times = match.groups()
    known = [*STEP_METRICS, DRIFT, *measured]
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise RequestError(f"{setting}={text!r}: no metric '{metric}' is measured. {hint}Known: {', '.join(known)}.")
    try:
        bound = float(number)
    except ValueError:
        raise RequestError(f"{setting}={text!r}: {number!r} is no number.") from None
    if bound != bound:
        raise RequestError(f"{setting}={text!r}: nothing compares with nan. Give a number.")
    if times is not None and int(times) < 1:
        raise RequestError(f"{setting}={text!r}: 'for {times}' must be 1 or more measurements.")
    return Rule(metric, comparison, bound, int(times or 1))


class RuleBook:
    """Asks rules of a run's numbers, counts how often each held in a row, and says which are met now.

    A rule that is met stays silent until it has failed to hold once: it does not save at every step from then on.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = list(rules)
        self._in_a_row = [0] * len(self.rules)

    def met(self, values: Mapping[str, float | None]) -> list[Rule]:
        """Rules that these measurements (by metric) meet for the first time in a row."""
        met = []
        for i, rule in enumerate(self.rules):
            if rule.metric not in values:
                continue
            self._in_a_row[i] = self._in_a_row[i] + 1 if rule.holds(values[rule.metric]) else 0
            if self._in_a_row[i] == rule.times:
                met.append(rule)
        return met

    def state_dict(self) -> dict[str, Any]:
        """All a resumed run needs; survives JSON. Keyed by the rules, so one that was changed starts anew."""
        return {str(rule): count for rule, count in zip(self.rules, self._in_a_row, strict=True)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._in_a_row = [state.get(str(rule), 0) for rule in self.rules]
