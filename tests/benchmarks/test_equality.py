"""Arms that compute something else are not timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.arms import Setting, Workbench
from benchmarks.clocks import WallClock
from benchmarks.equality import ArmsDiffer, Outcome, check_equal
from benchmarks.steps import ARMS, check_arms, make_workbench, short_rows
from benchmarks.trainer_arms import PlainTrainer, transformers_arm


def _outcome(loss: float | None = 2.0, factor: float = 1.0) -> Outcome:
    return Outcome(loss, {"a": torch.tensor([3.0, 4.0]) * factor, "b": torch.tensor([1e-9])})


def test_equal_arms_pass_and_their_errors_are_recorded() -> None:
    """Goes red if an arm that reports no loss is compared by it."""
    errors = check_equal("x", _outcome(None), "y", _outcome())
    assert errors["loss_error"] is None and errors["gradient_error"] == 0.0


@pytest.mark.parametrize("other", [_outcome(loss=2.0001), _outcome(factor=1.0001), _outcome(factor=float("nan"))])
def test_arms_that_differ_are_named(other: Outcome) -> None:
    """Goes red if loss or gradient is not looked at, or if nan passes as small."""
    with pytest.raises(ArmsDiffer, match="x does not compute what y does"):
        check_equal("x", other, "y", _outcome())


def test_a_gradient_that_is_missing_is_a_difference() -> None:
    """Goes red if only parameters that both have are compared."""
    with pytest.raises(ArmsDiffer, match="different parameters: b"):
        check_equal("x", Outcome(2.0, {"a": torch.tensor([3.0, 4.0])}), "y", _outcome())


class _MeanOfMeans(PlainTrainer):
    """A common mistake: each row's mean, averaged, in place of the mean over tokens."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="none")
        return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


@pytest.fixture
def bench(tmp_path: Path) -> tuple[Workbench, list]:
    made, rows, _ = make_workbench(Setting(4), WallClock(), tmp_path, is_tiny=True)
    return made, rows


def test_every_arm_computes_its_objective(bench: tuple[Workbench, list]) -> None:
    """Each trainer's own `train()` against autograd on full logits. Goes red if, for one, hf_compact shifts labels
    twice, or if psft's ratio is not 1 at the first step."""
    workbench, rows = bench
    arms = [ARMS[n] for n in ARMS if n not in ("psft_k1", "psft_k4", "psft_k16")]
    checks = check_arms(workbench, arms, short_rows(rows))
    assert {check["arm"] for check in checks} == {arm.name for arm in arms}


def test_a_wrong_trainer_is_caught_before_it_is_timed(bench: tuple[Workbench, list]) -> None:
    """Goes red if `check_arms` does not raise."""
    workbench, rows = bench
    with pytest.raises(ArmsDiffer, match="wrong does not compute what plain nll does"):
        check_arms(workbench, [transformers_arm("wrong", _MeanOfMeans)], short_rows(rows))
