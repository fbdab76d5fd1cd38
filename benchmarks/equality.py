"""Arms that claim to compute the same thing must, in float32, before any of them is timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RTOL = 1e-5
"""Relative; float32 sums of some thousand products in another order differ by about a tenth of it."""


class ArmsDiffer(AssertionError):
    """Two arms that would have been compared do not compute the same."""


@dataclass(frozen=True)
class Outcome:
    """What one arm makes of the rows all arms get. loss: nats per trained token, or None if the arm reports another
    number (psft reports -1); gradients: by parameter name, float32."""

    loss: float | None
    gradients: Mapping[str, Tensor]

    @functools.cached_property
    def norms(self) -> dict[str, float]:
        """Of each parameter's gradient."""
        return {name: _norm(gradient) for name, gradient in self.gradients.items()}


def check_equal(
    name: str, outcome: Outcome, reference_name: str, reference: Outcome, *, rtol: float = RTOL
) -> dict[str, Any]:
    """Compare one arm with the reference of its group.

    loss_error: |loss - reference| / |reference|. gradient_error: |g - g_ref| / |g_ref|, over all parameters together,
    and the same of the worst single parameter whose gradient is at least a thousandth of the whole one's.

    Returns:
        the three errors, for the record.
    Raises:
        ArmsDiffer: one of them is above `rtol` (ten times that for a single parameter), or not finite.
    """
    if outcome.gradients.keys() != reference.gradients.keys():
        extra = sorted(outcome.gradients.keys() ^ reference.gradients.keys())
        raise ArmsDiffer(f"{name} and {reference_name} have gradients of different parameters: {', '.join(extra[:5])}")
    whole = math.sqrt(sum(norm**2 for norm in reference.norms.values()))
    squared, worst = 0.0, 0.0
    for parameter, expected in reference.gradients.items():
        difference = _norm(outcome.gradients[parameter] - expected)
        squared += difference**2
        size = reference.norms[parameter]
        if size >= 1e-3 * whole:
            worst = max(worst, difference / size)
    loss_error = None
    if outcome.loss is not None and reference.loss is not None:
        loss_error = abs(outcome.loss - reference.loss) / abs(reference.loss)
    errors: dict[str, Any] = {
        "arm": name,
        "reference": reference_name,
        "loss_error": loss_error,
        "gradient_error": math.sqrt(squared) / whole,
        "worst_parameter_error": worst,
        "rtol": rtol,
    }
    limits = {"loss_error": rtol, "gradient_error": rtol, "worst_parameter_error": 10 * rtol}
    bad = {k: errors[k] for k, limit in limits.items() if errors[k] is not None and not errors[k] <= limit}
    if bad:
        shown = ", ".join(f"{key} {value:.2e}" for key, value in bad.items())
        raise ArmsDiffer(f"{name} does not compute what {reference_name} does: {shown} (float32, limit {rtol:g})")
    return errors


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients a model holds, by parameter name."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def describe(checks: list[dict[str, Any]]) -> str:
    """One line for the terminal."""
    if not checks:
        return "nothing to compare"
    loss = max((c["loss_error"] for c in checks if c["loss_error"] is not None), default=float("nan"))
    gradient = max(c["gradient_error"] for c in checks)
    return f"{len(checks)} comparisons in float32: loss within {loss:.1e}, gradients within {gradient:.1e}"
