"""The trust region of a run: its radius and its window, fixed as configured or moved by the controller."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch
from torch import Tensor

from psft.errors import RequestError
from psft.objectives import Objective
from psft.ops import MAX_LOG_RATIO
from psft.trainers.psft_config import PSFTConfig
from psft.window import Step, TrustRegionController

logger = logging.getLogger(__name__)

_RADII = ("epsilon_high", "tv_delta")
_SMALLEST_RADIUS = 1e-6  # below it the bound is in the rounding of float32 log-probs
_MOST_WINDOW_GROWTH = 8  # times the configured window; its micro-batches and old log-probs are kept in memory


class TrustRegion:
    """Asked at every window for its size, at every step for the objective's bound; told what the step measured.

    Without `target_clip_fraction` and `target_drift` it changes nothing.
    """

    def __init__(self, args: PSFTConfig, objective: Objective) -> None:
        self.radius_name = next((name for name in _RADII if name in objective.settings), None)
        self.radius: float | None = objective.settings[self.radius_name] if self.radius_name else None
        self.controller: TrustRegionController | None = None
        self._num_windows = 0
        self._is_cut_short = False
        self._has_warned = False
        target = args.target_clip_fraction if args.target_clip_fraction is not None else args.target_drift
        if target is not None:
            assert args.train_batch_size is not None and args.mini_batch_size is not None
            moves_window = args.controller_adjusts == "window"
            size = args.train_batch_size // args.mini_batch_size
            start = float(size) if moves_window else float(self.radius or 0.0)
            self.controller = TrustRegionController(
                measures="clip_fraction" if args.target_clip_fraction is not None else "drift",
                target=target,
                adjusts="window" if moves_window else "epsilon",
                value=start,
                minimum=2.0 if moves_window else _SMALLEST_RADIUS,
                maximum=max(_MOST_WINDOW_GROWTH * start, 2.0) if moves_window else max(10.0, start),
            )

    @property
    def overrides(self) -> dict[str, float]:
        """Settings of the objective that the controller has moved."""
        if self.controller is None or self.controller.adjusts != "epsilon" or self.radius_name is None:
            return {}
        return {self.radius_name: self.controller.value}

    def clipped(self, logps: Tensor, old_logps: Tensor) -> Tensor | None:
        """Bool, shaped like both: tokens beyond the bound in force, as the objective has it; None without a bound."""
        if self.radius_name is None or self.radius is None:
            return None
        radius = self.overrides.get(self.radius_name, self.radius)
        if self.radius_name == "epsilon_high":
            return logps - old_logps > min(math.log1p(radius), MAX_LOG_RATIO)
        return logps - old_logps > torch.log1p(radius * torch.exp(-old_logps)).clamp(max=MAX_LOG_RATIO)

    def num_mini_batches(self, first: Step) -> int:
        """Mini-batches of the window that begins with step `first`."""
        if self.controller is None or self.controller.adjusts != "window" or first.is_warmup:
            return first.num_mini_batches - first.mini_batch + 1
        return self.controller.num_mini_batches

    def labelled(self, steps: list[Step]) -> list[Step]:
        """The steps of a window with their place in it, which a moved window changes."""
        self._num_windows += 1
        if self.controller is None or self.controller.adjusts != "window" or steps[0].is_warmup:
            return steps
        # At the end of an epoch or of the run: its small drift says nothing about a full window.
        self._is_cut_short = len(steps) < self.controller.num_mini_batches
        return [
            dataclasses.replace(step, window=self._num_windows - 1, mini_batch=k, num_mini_batches=len(steps))
            for k, step in enumerate(steps, start=1)
        ]

    def row(self, step: Step) -> dict[str, Any]:
        """Fields of metrics.jsonl: the bound in force and the size of the window."""
        fields: dict[str, Any] = {"num_mini_batches": step.num_mini_batches}
        if self.radius_name is not None and not step.is_warmup:
            fields[self.radius_name] = self.overrides.get(self.radius_name, self.radius)
        return fields

    def step_ends(self, step: Step, row: dict[str, Any], *, is_last: bool) -> None:
        """Take in what a step measured over all ranks; at a window's end move the bound or the window's size."""
        if self.controller is None or step.is_warmup or self._is_cut_short:
            return
        self.controller.observe(step.mini_batch, row["tokens"], row.get("clip_fraction"), row.get("log_ratio_abs_mean"))
        if not is_last:
            return
        measured = self.controller.window_ends()
        if measured is not None and self.controller.is_at_limit and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the controller is at its limit: %s=%g measures %s=%g against a target of %g. The target cannot be "
                "met at this learning rate; change one of them.",
                self.controller.adjusts, self.controller.value, self.controller.measures, measured,
                self.controller.target,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on alike; survives JSON."""
        return {
            "controller": None if self.controller is None else self.controller.state_dict(),
            "num_windows": self._num_windows,
            "is_cut_short": self._is_cut_short,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RequestError: the controller's target or what it moves is another now."""
        has_state = state["controller"] is not None
        if has_state != (self.controller is not None):
            raise RequestError(
                f"the run was {'' if has_state else 'not '}steered by a controller. "
                f"{'Give' if has_state else 'Leave out'} target_clip_fraction or target_drift, as before."
            )
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        self._num_windows, self._is_cut_short = state["num_windows"], state["is_cut_short"]
