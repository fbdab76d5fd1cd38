"""Numbers of readiness, from answers whose numbers are known by hand."""

from __future__ import annotations

import pytest

from psft.evaluation.identity import Model
from psft.evaluation.readiness.drift import Drift, recorded_drift
from psft.evaluation.readiness.measures import Measures, measure_prompt
from psft.evaluation.results import ItemScores
from psft.runs import RunFolder

UNKNOWN = Drift(None, "not known")


def answers(right: int, of: int, *, cut: int = 0, silent: int = 0) -> ItemScores:
    """Scores of one prompt: the last `cut` answers ran into the limit, the `silent` ones before them have no answer."""
    return ItemScores(
        scores=[1.0] * right + [0.0] * (of - right),
        answers=["7"] * (of - silent - cut) + [None] * silent + ["7"] * cut,
        truncated=[False] * (of - cut) + [True] * cut,
    )


def test_the_numbers_of_a_prompt_are_those_of_its_answers():
    """By hand, 1 of 4 right: pass@2 = 1 - C(3,2)/C(4,2) = 1/2; a pair is mixed in 3 of 6 cases.

    Goes red if room is not pass - avg, a group's chance is not that of drawing without putting back, or an answer that
    was cut off, or in which nothing was found, counts as readable.
    """
    found = measure_prompt(answers(1, 4, cut=1, silent=1), k=2, group_size=2, entropies=[(1.0, 4), (2.0, 2)])
    assert found is not None
    assert (found.average, found.best, found.room, found.mixed) == (0.25, 0.5, 0.25, 0.5)
    assert found.readable == 0.5 and (found.entropy, found.tokens) == (3.0, 6)
    assert measure_prompt(answers(1, 3), k=4, group_size=4, entropies=None) is None


def test_the_numbers_of_a_model_are_means_over_prompts_and_its_entropy_over_tokens():
    """Goes red if entropy is a mean of prompts' means (it would be 0.55), or an error is over answers."""
    prompts = {}
    for i, right in enumerate((0, 4, 1, 2)):
        prompt = measure_prompt(answers(right, 4), k=4, group_size=4, entropies=[(3.0 * (i + 1), 10 * (i + 1) ** 2)])
        assert prompt is not None
        prompts[str(i)] = prompt
    model = Measures("m", prompts, 4, 4, UNKNOWN)
    found = {what: model.estimate(what) for what in ("average", "best", "room", "mixed", "entropy")}
    assert {what: estimate.value for what, estimate in found.items()} == pytest.approx(  # type: ignore[union-attr]
        {"average": 0.4375, "best": 0.75, "room": 0.3125, "mixed": 0.5, "entropy": 30 / 300}
    )
    mixed = found["mixed"]
    assert mixed is not None and mixed.stderr == pytest.approx((1 / 3) ** 0.5 / 2) and mixed.n == 4
    assert model.to_json()["pass@4"]["value"] == 0.75 and model.to_json()["drift_source"] == "not known"


def test_a_model_that_was_not_asked_has_no_entropy():
    """Goes red if a missing entropy is taken for 0."""
    prompt = measure_prompt(answers(1, 4), k=4, group_size=4, entropies=None)
    assert prompt is not None and Measures("m", {"a": prompt}, 4, 4, UNKNOWN).estimate("entropy") is None


def test_drift_is_that_of_the_runs_probe_at_the_models_step(tmp_path):
    """Goes red if another step's row, or another group's, is taken; or if it is not said why nothing is known."""
    run = RunFolder(tmp_path / "run")
    run.write_json("run.json", {})
    for step, drift in ((0, 0.0), (20, 0.02), (40, 0.05)):
        for group, value in (("all", drift), ("code", 9.0)):
            row = {"step": step, "group": group, "drift_nats_per_token": value, "stderr": 0.01, "prompts": 84}
            run.append("probe.jsonl", row)
    found = recorded_drift(Model("m", "x", tmp_path, tmp_path / "run", 40))
    assert found.estimate is not None and (found.estimate.value, found.estimate.n) == (0.05, 84)
    assert found.estimate.low == pytest.approx(0.05 - 1.96 * 0.01)
    missing = recorded_drift(Model("m", "x", tmp_path, tmp_path / "run", 30))
    assert missing.estimate is None and "measured it at steps 0, 20, 40" in missing.source
    assert "no checkpoint of a run" in recorded_drift(Model("m", "x", tmp_path)).source
