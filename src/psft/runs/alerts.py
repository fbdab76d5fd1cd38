"""What a person should know about a run, in plain words, once each: read off its rows as they come.

No torch, no trainer: training feeds the rows as it writes them, a report feeds those it reads, and both say the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LEAST_CLIP_FRACTION = 0.01
"""Of the tokens of mini-batches 2..K. Below it, over `CLIP_WINDOWS` windows, PSFT is SFT: measured on SmolLM2-135M at
learning rate 1e-5, 0.3 to 0.6 % clipped, and losses equal to those of SFT with the same steps."""
CLIP_WINDOWS = 3
SPIKE_FACTOR = 10.0
"""A gradient norm this many times the median of the last `SPIKE_STEPS` steps is a spike."""
SPIKE_STEPS = 50
_LEAST_SPIKE_STEPS = 10
SAWTOOTH_BOUNDARIES = 2
"""Epoch boundaries at which entropy must have dropped, all of them so far, before it is called a saw-tooth."""
_LEAST_DROP = 0.01  # nats beyond the trend: less is no tooth a person sees
_NOISE_FACTOR = 3.0
_BLOCK_SHARE, _MOST_BLOCK_STEPS = 10, 20  # a block is a tenth of an epoch, of 20 steps at most
_HELD_OUT_TOLERANCE = 0.01  # nats per token: a rise below it is no rise


@dataclass(frozen=True)
class Alert:
    """Something to know, first seen at `step`. name: stable, for programs; message: what is seen and what to do."""

    step: int
    name: str
    message: str


class Watch:
    """Follows one run: `metrics`, `evaluated` and `probed` take a row each and return what is new to say.

    Args:
        drift_budget: nats per token the retention probe may drift before it is said; None = never.
    """

    def __init__(self, drift_budget: float | None = None) -> None:
        self.drift_budget = drift_budget
        self.said: list[Alert] = []
        self._clip = _ClipWatch()
        self._spikes = _SpikeWatch()
        self._sawtooth = _SawtoothWatch()
        self._overfit = _OverfitWatch()

    def metrics(self, row: Mapping[str, Any]) -> list[Alert]:
        """Take in a row of metrics.jsonl."""
        self._overfit.trained(row)
        said = (self._clip.says(row), self._spikes.says(row), self._sawtooth.says(row))
        return [] if said == (None, None, None) else self._new(said, step=int(row.get("step", 0)))

    def evaluated(self, row: Mapping[str, Any]) -> list[Alert]:
        """Take in a row of eval.jsonl."""
        return self._new([self._overfit.says(row)], step=int(row.get("step", 0)))

    def probed(self, row: Mapping[str, Any]) -> list[Alert]:
        """Take in a row of probe.jsonl; only the one over all prompts counts."""
        drift, stderr = row.get("drift_nats_per_token"), row.get("stderr") or 0.0
        is_over = (
            self.drift_budget is not None
            and row.get("group") == "all"
            and drift is not None
            and drift - 2 * stderr > self.drift_budget
        )
        said = None
        if is_over:
            said = (
                "drift",
                f"the model has drifted {drift:.3f} +- {stderr:.3f} nats per token from where it began on general "
                f"prompts, over the budget of {self.drift_budget:g}: it is forgetting. Lower the learning rate (or "
                "epsilon_high, where the objective clips), train fewer epochs, or take an earlier checkpoint.",
            )
        return self._new([said], step=int(row.get("step", 0)))

    def _new(self, found: Iterable[tuple[str, str] | None], *, step: int) -> list[Alert]:
        named = {alert.name for alert in self.said}
        new = [Alert(step, *said) for said in found if said is not None and said[0] not in named]
        self.said += new
        return new


@dataclass
class _ClipWatch:
    """Is the clip ever at work? Counted over whole windows, without their first mini-batch, whose ratio is 1."""

    _fractions: deque[float] = field(default_factory=lambda: deque(maxlen=CLIP_WINDOWS))
    _clipped: float = 0.0
    _tokens: float = 0.0

    def says(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        k, last = row.get("mini_batch", 1), row.get("num_mini_batches", 1)
        fraction, tokens = row.get("clip_fraction"), row.get("tokens") or 0
        if row.get("stage") == "warmup" or last < 2:
            return None
        if k == 1:
            self._clipped = self._tokens = 0.0
        elif fraction is not None:
            self._clipped += fraction * tokens
            self._tokens += tokens
        if k < last or not self._tokens:
            return None
        self._fractions.append(self._clipped / self._tokens)
        if len(self._fractions) < CLIP_WINDOWS or max(self._fractions) >= LEAST_CLIP_FRACTION:
            return None
        return (
            "clip_inactive",
            f"the clip never acts: {max(self._fractions):.2%} of the tokens at most were clipped in each of the last "
            f"{CLIP_WINDOWS} windows, so this is plain SFT at this learning rate. Raise learning_rate, lower "
            "epsilon_high, put more mini-batches into a window, or set --target_clip_fraction 0.02.",
        )


@dataclass
class _SpikeWatch:
    """Gradient norms far above what they were."""

    _norms: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_STEPS))
    _floor: float = math.inf  # no norm of `_norms` is below it, so neither is their median, which takes long to find

    def says(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        norm = row.get("grad_norm")
        if norm is None or not math.isfinite(norm):
            return None
        usual = None
        if norm > SPIKE_FACTOR * self._floor and len(self._norms) >= _LEAST_SPIKE_STEPS:
            usual, self._floor = statistics.median(self._norms), min(self._norms)
        self._floor = min(self._floor, norm)
        self._norms.append(norm)
        if usual is None or not norm > SPIKE_FACTOR * usual > 0:
            return None
        return (
            "gradient_spike",
            f"the gradient norm jumped to {norm:.3g}, {norm / usual:.0f} times its usual {usual:.3g}. Look at the rows "
            "of this step; lower learning_rate or max_grad_norm"
            + ("." if row.get("clip_fraction") is None else ", or epsilon_high if it is larger than 0.28."),
        )


@dataclass
class _SawtoothWatch:
    """Entropy that drops whenever an epoch begins: the model recalls the rows it has seen.

    At each boundary the last block of steps of the epoch is held against the first of the next. The drop counts where
    it exceeds what neighbouring blocks inside epochs differ by, trend and noise.
    """

    _epochs: list[list[float]] = field(default_factory=list)
    _epoch: int = -1
    _block: int | None = None  # steps after which the epoch's beginning is judged; None: it is too early to judge

    def says(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        entropy, epoch = row.get("entropy"), row.get("epoch")
        if entropy is None or epoch is None:
            return None
        number = math.ceil(epoch - 1e-9) - 1  # the step that ends epoch 1 has epoch 1.0
        if number != self._epoch:
            self._epoch = number
            self._epochs.append([])
            if len(self._epochs) > SAWTOOTH_BOUNDARIES:
                self._block = max(1, min(len(self._epochs[0]) // _BLOCK_SHARE, _MOST_BLOCK_STEPS))
        values = self._epochs[-1]
        values.append(entropy)
        return self._tooth(self._block) if len(values) == self._block else None

    def _tooth(self, size: int) -> tuple[str, str] | None:
        means = statistics.fmean
        pairs = zip(self._epochs, self._epochs[1:], strict=False)
        drops = [means(before[-size:]) - means(after[:size]) for before, after in pairs]
        blocks = [[means(e[i : i + size]) for i in range(0, len(e) - size + 1, size)] for e in self._epochs]
        inside = [a - b for epoch in blocks for a, b in zip(epoch, epoch[1:], strict=False)]
        if len(inside) < 4:
            return None
        trend, noise = statistics.mean(inside), statistics.stdev(inside)
        if min(drops) - trend < max(_NOISE_FACTOR * noise, _LEAST_DROP):
            return None
        return (
            "entropy_sawtooth",
            f"entropy drops at every epoch boundary, by {statistics.mean(drops):.3f} nats on average: the model "
            "recalls rows it has already seen. Train fewer epochs, lower the learning rate, or, if this is SFT, use "
            "--objective psft.",
        )


@dataclass
class _OverfitWatch:
    """Training NLL falls while held-out NLL rises, by the best evaluation of each data set."""

    _best: dict[str, tuple[float, int]] = field(default_factory=dict)
    _rises: dict[str, int] = field(default_factory=dict)
    _before: dict[str, float] = field(default_factory=dict)
    _recent: list[float] = field(default_factory=list)
    _mean: float | None = None
    _step: int = -1

    def trained(self, row: Mapping[str, Any]) -> None:
        if row.get("nll") is not None:
            self._recent.append(row["nll"])

    def says(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        name, value, step = row.get("benchmark", ""), row.get("value"), int(row.get("step", 0))
        if row.get("metric") != "nll" or value is None:
            return None
        if step != self._step:  # several data sets are measured at one step
            self._step, self._mean = step, statistics.fmean(self._recent) if self._recent else None
            self._recent = []
        recent = self._mean
        best, best_step = self._best.get(name, (math.inf, 0))
        if value < best:
            self._best[name], self._rises[name] = (value, step), 0
            if recent is not None:
                self._before[name] = recent
            return None
        self._rises[name] = self._rises.get(name, 0) + 1 if value > best + _HELD_OUT_TOLERANCE else 0
        before = self._before.get(name)
        if self._rises[name] < 2 or recent is None or before is None or recent >= before:
            return None
        return (
            "overfitting",
            f"held-out NLL of {name} rose from {best:.3f} (step {best_step}) to {value:.3f} nats per token while the "
            f"training NLL fell from {before:.3f} to {recent:.3f}: the model overfits. Take the checkpoint of step "
            f"{best_step}, train fewer epochs, or lower the learning rate.",
        )
