"""Optimizer steps whose loss or gradient is not finite: passed over, counted, and in the end the run stops."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import Tensor

from psft.errors import RunFailed

logger = logging.getLogger(__name__)


class BadSteps:
    """What was passed over. limit: how many in a row end the run.

    in_a_row: bad steps since the last good one. found: one entry a bad step, for run.json.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self.found: list[dict[str, Any]] = []

    def is_bad(self, loss: Tensor, grad_norm: Any) -> bool:
        """Whether a step is bad; a good one ends a series. Both numbers are over all ranks, so ranks agree.

        grad_norm: None where an engine does not give it; then the loss alone tells.
        """
        if math.isfinite(float(loss)) and (grad_norm is None or math.isfinite(float(grad_norm))):
            self.in_a_row = 0
            return False
        return True

    def skip(self, step: int, loss: Tensor, grad_norm: Any, rows: list[int], *, is_taken: bool = False) -> None:
        """Count a bad step and name its rows.

        Args:
            is_taken: the weights have changed by it already: DeepSpeed takes a step inside the backward pass.
        Raises:
            RunFailed: it is taken.
        """
        self.in_a_row += 1
        norm = None if grad_norm is None else str(float(grad_norm))
        what = {"step": step, "loss": str(float(loss)), "grad_norm": norm, "rows": rows}
        self.found.append(what)
        if is_taken:
            raise RunFailed(
                f"step {step} had loss {what['loss']} and gradient norm {what['grad_norm']} (rows "
                f"{', '.join(map(str, rows))} of the training data), and DeepSpeed takes a step before it can be "
                "passed over. Every checkpoint is from before it. Look at these rows, lower learning_rate, or use "
                "--accelerate fsdp2, which passes over such a step."
            )
        logger.warning(
            "step %d is passed over: loss %s, gradient norm %s. Rows of the training data: %s.",
            step, what["loss"], what["grad_norm"], ", ".join(map(str, rows)),
        )  # fmt: skip

    def stop_if_too_many(self) -> None:
        """Raise `RunFailed` once `limit` steps in a row were bad."""
        if self.in_a_row >= self.limit:
            rows = ", ".join(map(str, self.found[-1]["rows"]))
            raise RunFailed(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite, the last on rows {rows} of "
                "the training data (all in run.json under bad_steps). No weight was changed by them. Look at these "
                "rows, lower learning_rate, or raise max_bad_steps."
            )
