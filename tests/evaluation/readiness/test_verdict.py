"""Laws of the verdict: what is proven decides, what is not is said so, and each reason can be told apart."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from psft.evaluation.readiness.compare import SIGNIFICANT, compare_all
from psft.evaluation.readiness.drift import Drift
from psft.evaluation.readiness.fitness import fitness_of
from psft.evaluation.readiness.measures import Measures, measure_prompt
from psft.evaluation.readiness.verdict import judge
from psft.evaluation.results import ItemScores
from psft.evaluation.statistics import Estimate

GROUP = 8


def model(
    name: str, right: list[int], *, entropy: float | None = 0.5, readable: float = 1.0, drift: Drift | None = None
) -> Measures:
    """right: of 8 answers, by prompt. entropy: nats a token, about which prompts scatter. readable: share of them."""
    prompts = {}
    for i, count in enumerate(right):
        num_read = round(readable * GROUP)
        scores = ItemScores(
            [1.0] * count + [0.0] * (GROUP - count), ["7"] * num_read + [None] * (GROUP - num_read), [False] * GROUP
        )
        own = None if entropy is None else [(100 * (entropy + 0.01 * (i % 5 - 2)), 100)]
        prompt = measure_prompt(scores, k=GROUP, group_size=GROUP, entropies=own)
        assert prompt is not None
        prompts[str(i)] = prompt
    return Measures(name, prompts, GROUP, GROUP, drift or Drift(None, "not known"))


def drifted(value: float, scatter: float = 0.01) -> Drift:
    values = tuple(value + scatter * (i % 3 - 1) for i in range(84))
    return Drift(Estimate(value, 0.001, value - 0.002, value + 0.002, 84), "measured", values)


def test_one_that_solves_more_prompts_with_one_of_k_is_the_start():
    """Goes red if avg@k decides: here the other one is ahead in it."""
    sharp = model("sft", [8] * 32 + [1] * 6 + [0] * 26)  # avg 51 %, pass 59 %
    wide = model("psft", [3] * 64)  # avg 37.5 %, pass 100 %
    verdict = judge([sharp, wide])
    assert verdict.start == "psft" and verdict.ranking == ["psft", "sft"]
    said = " ".join(verdict.lines)
    assert "Against sft: it solves 40.6 points more of the prompts with one of 8 answers" in said


def test_more_groups_of_mixed_outcome_decide_where_pass_does_not():
    """Goes red if the second number is not looked at, or the model that is ahead today is not mentioned."""
    sharp = model("sft", [8] * 44 + [7] * 20)
    wide = model("psft", [6] * 64)
    verdict = judge([sharp, wide])
    assert verdict.start == "psft"
    said = " ".join(verdict.lines)
    assert "68.8 points more groups of mixed outcome" in said
    assert "sft gives 21.1 points more right answers today. If RL will be short" in said
    said = " ".join(judge([sharp, model("psft", [6] * 64, entropy=0.9)]).lines)
    assert "overtakes" in said


def test_entropy_then_drift_decide_where_outcomes_are_alike():
    """Goes red if either is not looked at, the wrong direction is better, or the order is another."""
    low, high = model("a", [4] * 40, entropy=0.2), model("b", [4] * 40, entropy=0.6)
    verdict = judge([low, high])
    assert verdict.start == "b" and "0.400 nats a token more entropy" in " ".join(verdict.lines)
    near, far = model("a", [4] * 40, drift=drifted(0.02)), model("b", [4] * 40, drift=drifted(0.09))
    verdict = judge([far, near])
    assert verdict.start == "a" and "drifted 0.070 nats a token less" in " ".join(verdict.lines)
    assert judge([replace(low, drift=drifted(0.01)), replace(high, drift=drifted(0.09))]).start == "b"


def test_what_the_prompts_do_not_show_is_no_difference():
    """Six prompts, 5 against 4 mixed. Goes red if the larger number is called better."""
    verdict = judge([model("a", [1, 1, 1, 1, 0, 0]), model("b", [1, 1, 1, 1, 1, 0])])
    assert verdict.start == "b" and not any(comparison.is_proven for comparison in verdict.comparisons)
    said = " ".join(verdict.lines)
    assert "6 prompts do not tell b and a apart" in said and "no proven difference" in said and "Against" not in said
    assert "prompts would show it" in said


def test_equal_models_are_hardly_ever_told_apart():
    """Four equal models, 60 times, 12 comparisons each: nothing is found. Goes red without the correction: 12 are."""
    generator = np.random.default_rng(4)
    false = 0
    for _ in range(60):
        chances = generator.beta(0.5, 1, 40)
        models = [model(name, generator.binomial(GROUP, chances).tolist(), entropy=None) for name in "abcd"]
        false += any(comparison.is_proven for comparison in compare_all(models))
    assert false <= 5


def test_the_order_in_which_models_are_named_is_no_matter():
    """Goes red if ties or eliminations depend on it."""
    models = [model("a", [8] * 30 + [1] * 34), model("b", [4] * 64), model("c", [2] * 50 + [0] * 14),
              model("d", [0] * 64)]  # fmt: skip
    rankings = {tuple(judge(order).ranking) for order in itertools.permutations(models)}
    assert rankings == {("b", "a", "c", "d")}


@pytest.mark.parametrize(
    ("right", "readable", "why"),
    [
        ([0] * 64, 1.0, "the prompts are too hard for it"),
        ([8] * 64, 1.0, "the prompts are too easy for it"),
        ([8] * 32 + [0] * 32, 1.0, "nearly the same answer to a prompt each time"),
        ([3] * 64, 0.25, "most of the reward would be about the form"),
    ],
)
def test_a_model_that_cannot_learn_is_not_ready(right, readable, why):
    """Goes red if it is recommended, or the reason is another's."""
    verdict = judge([model("m", right, readable=readable)])
    assert verdict.start is None and verdict.lines[0] == "Start from none of these yet."
    assert any(line.startswith("m is not ready: ") and why in line for line in verdict.lines)
    assert judge([model("m", right, readable=readable), model("n", [3] * 64)]).ranking == ["n", "m"]


def test_a_bound_that_the_interval_holds_is_a_warning():
    """Two prompts of 30 mixed: 7 %, but perhaps 22 %. Goes red if the value alone makes a model not ready."""
    found = fitness_of(model("m", [1] * 2 + [0] * 28))
    assert not [text for text in found.problems if "mixed" in text]
    assert any("mixed outcome is 7% " in text for text in found.warnings) and found.is_doubtful
    assert judge([model("m", [1] * 2 + [0] * 28)]).lines[0] == "m is ready for RL as far as is known: see the warnings."


def test_low_entropy_and_high_drift_are_warnings_only():
    """Goes red if a threshold that the paper does not name refuses a model."""
    found = fitness_of(model("m", [4] * 32, entropy=0.05, drift=drifted(0.3)))
    assert not found.problems
    assert "entropy is 0.049" in found.warnings[0] and "drifted 0.300" in found.warnings[1]


def test_unknown_numbers_are_said_and_compare_with_nothing():
    """Goes red if a missing entropy or drift counts as the best, or as the worst."""
    verdict = judge([model("a", [4] * 40, entropy=None), model("b", [4] * 40, entropy=0.9, drift=drifted(0.09))])
    assert not any(c.is_proven for c in verdict.comparisons)
    assert {c.what for c in verdict.comparisons} == {"best", "mixed"}
    alone = judge([model("a", [4] * 40, entropy=None)])
    assert alone.lines[0] == "a is ready for RL." and "Drift of a is not known." in alone.lines
    assert any(line.startswith("Entropy is not known") for line in alone.lines)


def test_drifts_of_two_runs_are_compared_by_their_errors():
    """Goes red if measurements of which only the errors are known are not compared, or without their errors."""

    def known(value: float, stderr: float) -> Drift:
        return Drift(Estimate(value, stderr, None, None, 84), "the run's probe")

    (far,) = [c for c in compare_all([model("a", [4] * 9, drift=known(0.02, 0.004)),
                                      model("b", [4] * 9, drift=known(0.09, 0.004))]) if c.what == "drift"]  # fmt: skip
    assert far.ahead == "a" and far.difference == pytest.approx(-0.07) and far.p_holm < SIGNIFICANT
    (near,) = [c for c in compare_all([model("a", [4] * 9, drift=known(0.02, 0.05)),
                                       model("b", [4] * 9, drift=known(0.09, 0.05))]) if c.what == "drift"]  # fmt: skip
    assert not near.is_proven
