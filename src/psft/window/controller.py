"""A controller that moves the clip bound, or the length of the window, until clipping or drift meets a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from psft.errors import RequestError

_SIGNS = {  # which way the value goes when more is measured than asked for
    ("clip_fraction", "epsilon"): +1,  # a wider bound clips fewer tokens
    ("clip_fraction", "window"): -1,  # fewer updates carry fewer ratios past the bound
    ("drift", "epsilon"): -1,  # a tighter bound lets the ratio go less far
    ("drift", "window"): -1,  # fewer updates carry the ratio less far
}
_NAMES = {"epsilon": "epsilon_high", "window": "mini-batches per window"}


class TrustRegionController:
    """Integral control in log space, one step a window: value *= exp(sign * gain * error), with

        error = clamp(log(measured / target) / scale, -1, 1),  scale = max(1, log(1/target)) of a fraction, 1 of a drift

    measured: token mean, over mini-batches 2..K of one window, of the clip fraction or of |log ratio| (nats).
    sign: + where more clipping asks for a wider epsilon, - for the other three pairs (tighter epsilon, smaller K).

        observe(mini_batch, ...)   after every optimizer step; mini-batch 1 does not count: its ratio is 1 by definition
        window_ends()              before the next window is drawn: the value moves, the measurement starts afresh

    Why so. Epsilon and K are known beforehand to a factor at best, so equal factors are equal corrections, and a
    product never turns negative. The value integrates the error: only the target itself is a resting point, whatever
    the learning rate. The limits hold the value itself, so no separate sum winds up behind them. A step of at most a
    factor e^gain outlives any one strange window, and a measured 0, whose log would be infinite, makes that full step.

    Why that scale. With exponential (Laplace) tails of the log ratio, 1 % more epsilon lowers a clip fraction p by at
    most log(1/2p) %, with Gaussian tails by at most 2 log(1/p) %: 3.2 and 5.0 at p = 0.02. Undivided, a gain of 0.5
    would correct a Gaussian 2.5 times over each window and swing for ever. Divided by log(1/p), a window takes back at
    most 2 gain of a small error, for either tail and for K as well. Drift grows from sqrt(K) (updates that wander) to
    K (updates that agree), so a window takes back gain/2 to gain of it. Hence 0.5: it approaches from one side, and
    still settles, after a swing, where a new value takes hold one window late (rows fetched ahead).

    K is rounded, its float is not: small steps add up, and where the target lies between two whole numbers K
    alternates between them, so that the mean over windows meets it.

    A measurement that is no number >= 0 (None, NaN, inf) is left out as if the step had no tokens: it neither moves
    nor spoils the value, nor the rest of its window. A window with nothing measured leaves the value as it is.

    Args:
        measures: "clip_fraction" or "drift".
        target: target_clip_fraction, in (0, 1), or target_drift, > 0, nats.
        adjusts: "epsilon" (dimensionless, > 0) or "window" (mini-batches per window, at least 2: one has no ratio).
        value: where to start, inside the limits.
        minimum, maximum: the limits, whole numbers for "window"; see `is_at_limit`.
        gain: in (0, 1]. The step of a window is at most a factor e^gain.
    Raises:
        RequestError: an argument outside its range, by the name of the setting.
    """

    def __init__(
        self,
        *,
        measures: Literal["clip_fraction", "drift"],
        target: float,
        adjusts: Literal["epsilon", "window"],
        value: float,
        minimum: float,
        maximum: float,
        gain: float = 0.5,
    ) -> None:
        _check(measures, target, adjusts, value, minimum, maximum, gain)
        self.measures = measures
        self.target = float(target)
        self.adjusts = adjusts
        self.value = float(value)
        """Epsilon, or mini-batches per window before rounding."""
        self.minimum = float(minimum)
        self.maximum = float(maximum)
        self.gain = float(gain)
        self._window_mean = 0.0  # of the measurement, over the tokens of the open window
        self._window_tokens = 0

    @property
    def num_mini_batches(self) -> int:
        """The next window's K, rounded; at least 2."""
        assert self.adjusts == "window", "this controller adjusts epsilon"
        return round(self.value)  # within the limits, which are whole

    @property
    def is_at_limit(self) -> bool:
        """Whether the value sits at a limit: once `window_ends` has measured something, the target is beyond reach."""
        return self.value in (self.minimum, self.maximum)

    def observe(
        self, mini_batch: int, num_tokens: int, clip_fraction: float | None, log_ratio_abs_mean: float | None
    ) -> None:
        """Take in one optimizer step.

        Under "window", leave out the steps of a window cut short (the tail of an epoch): held against a K that did
        not run, its small drift would ask for more.

        Args:
            mini_batch: 1-based number within the window.
            num_tokens: counted tokens of the step. This and the rest over all ranks, so that ranks stay in step.
            clip_fraction: share of those tokens whose gradient the clip removed.
            log_ratio_abs_mean: nats, their mean |log ratio|.
        """
        measured = clip_fraction if self.measures == "clip_fraction" else log_ratio_abs_mean
        if mini_batch < 2 or num_tokens < 1 or measured is None or not 0 <= measured < math.inf:
            return
        self._window_tokens += int(num_tokens)
        # A running mean, not a sum: as exact to resume, and it cannot overflow.
        self._window_mean += (int(num_tokens) / self._window_tokens) * (float(measured) - self._window_mean)

    def window_ends(self) -> float | None:
        """Move the value by what the window measured, and return that; None if it measured nothing."""
        if not self._window_tokens:
            return None
        measured = self._window_mean
        self._window_mean, self._window_tokens = 0.0, 0
        step = _SIGNS[self.measures, self.adjusts] * self.gain * self._error(measured)
        self.value = min(max(self.value * math.exp(step), self.minimum), self.maximum)
        return measured

    def _error(self, measured: float) -> float:
        """log(measured / target) in units of `scale`, within [-1, 1]; -1 for a measured 0."""
        scale = max(1.0, -math.log(self.target)) if self.measures == "clip_fraction" else 1.0
        ratio = max(measured / self.target, math.exp(-scale))  # floor inside the logarithm: log(0) has no value
        return min(max(math.log(ratio) / scale, -1.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on to the bit, also inside a window; survives JSON."""
        return {
            "measures": self.measures,
            "target": self.target,
            "adjusts": self.adjusts,
            "value": self.value,
            "window_mean": self._window_mean,
            "window_tokens": self._window_tokens,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Limits and gain are this run's: a value outside new limits moves to the nearer.

        Raises:
            RequestError: the state steers something else or towards another target, or is damaged; nothing is loaded.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise RequestError(f"the controller's state in the checkpoint lacks {missing}. Resume from another one.")
        target = f"target_{state['measures']}={state['target']}"
        if (state["measures"], state["target"]) != (self.measures, self.target):
            raise RequestError(
                f"target_{self.measures}={self.target} cannot go on from this checkpoint, made with {target}. Set "
                f"{target}, or start a new run."
            )
        if state["adjusts"] != self.adjusts:
            raise RequestError(
                f"adjusts='{self.adjusts}' ({_NAMES[self.adjusts]}) cannot go on from this checkpoint, made with "
                f"adjusts='{state['adjusts']}'. Set that, or start a new run."
            )
        value, mean, tokens = float(state["value"]), float(state["window_mean"]), int(state["window_tokens"])
        if not (0 < value < math.inf and 0 <= mean < math.inf and tokens >= 0):
            raise RequestError(
                f"the controller's state in the checkpoint is damaged: value={value}, window_mean={mean}, "
                f"window_tokens={tokens}. Resume from another one."
            )
        self.value = min(max(value, self.minimum), self.maximum)
        self._window_mean, self._window_tokens = mean, tokens


def _check(
    measures: str, target: float, adjusts: str, value: float, minimum: float, maximum: float, gain: float
) -> None:
    """Raise `RequestError` with every argument that cannot be used, each by its setting's name."""
    for name, given, known in (
        ("measures", measures, ("clip_fraction", "drift")),
        ("adjusts", adjusts, ("epsilon", "window")),
    ):
        if given not in known:
            raise RequestError(f"{name}='{given}' is not known. Use {' or '.join(known)}.")
    problems = []
    if measures == "clip_fraction" and not 0 < target < 1:
        problems.append(f"target_clip_fraction={target} must lie in (0, 1); 0.02 clips one token in fifty")
    if measures == "drift" and not 0 < target < math.inf:
        problems.append(f"target_drift={target} must be a number of nats greater than 0")
    if not 0 < gain <= 1:
        problems.append(f"gain={gain} must lie in (0, 1]: beyond 1 the value may swing instead of settling")
    name = _NAMES[adjusts]
    limits = f"minimum={minimum} and maximum={maximum} of {name}"
    if adjusts == "epsilon" and not 0 < minimum < maximum < math.inf:
        problems.append(f"{limits} must be greater than 0, finite, and minimum the smaller")
    elif adjusts == "window" and not (2 <= minimum < maximum < math.inf and minimum % 1 == 0 == maximum % 1):
        problems.append(
            f"{limits} must be whole numbers from 2 on, and minimum the smaller: one mini-batch has no ratio"
        )
    elif not minimum <= value <= maximum:
        problems.append(f"{name}={value} to start with must lie between minimum={minimum} and maximum={maximum}")
    if problems:
        raise RequestError("; ".join(problems) + ".")
