"""Rewards of a run: combined, guarded, and every way to fail reported with its prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest

from psft.errors import RequestError, RunFailed
from psft.rewards import pool
from psft.rewards.reward_set import Answered, RewardSet

SOURCE = """
import os, time

def num_letters(prompts, completions, completion_ids, factor, **columns):
    assert len(prompts) == len(completions) == len(completion_ids) == len(factor)
    return [f * len(c[0]["content"]) for f, c in zip(factor, completions)]

def does_not_apply(completions, **columns):
    return [None if c[0]["content"] == "b" else 2.0 for c in completions]

def raises(prompts, **columns):
    if prompts[0][-1]["content"] == "bad":
        raise KeyError("no such thing")
    return [1.0] * len(prompts)

def not_a_number(prompts, completions, **columns):
    return [float("nan") if p[-1]["content"] == "bad" and c[0]["content"] == "b" else 1.0
            for p, c in zip(prompts, completions)]

def mis_sized(prompts, **columns):
    return [1.0] * (3 if prompts[0][-1]["content"] == "bad" else len(prompts))

def no_list(prompts, **columns):
    return 1.0 if prompts[0][-1]["content"] == "bad" else [1.0] * len(prompts)

def computes_for_ever(prompts, **columns):
    while prompts[0][-1]["content"] == "bad":
        pass
    return [1.0] * len(prompts)

def waits_for_ever(prompts, **columns):
    while prompts[0][-1]["content"] == "bad":
        time.sleep(1)
    return [1.0] * len(prompts)

def dies(prompts, **columns):
    if prompts[0][-1]["content"] == "bad":
        os._exit(3)
    return [1.0] * len(prompts)

NOT_CALLABLE = 3
"""

Made = Any


@pytest.fixture
def make(tmp_path, monkeypatch) -> Iterator[Made]:
    """make(weights, settings, **more) -> RewardSet; functions of SOURCE are `psft_test_rewards:NAME`."""
    (tmp_path / "psft_test_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    made: list[RewardSet] = []

    def call(weights, settings=None, **more) -> RewardSet:
        more = {"max_completion_length": 8, "time_limit": 0.3, "num_workers": 1, **more}
        made.append(RewardSet(weights, settings, **more))
        return made[-1]

    yield call
    for one in made:
        one.close()


def answers(*questions: str, **columns: Any) -> list[Answered]:
    """The answers "a" and "b" to each question."""
    return [
        Answered({"gold": "4", **columns}, [{"role": "user", "content": question}], text, [1] * (index + 1))
        for question in questions
        for index, text in enumerate("ab")
    ]


def test_rewards_are_weighed_and_added(make):
    """Goes red if a weight is lost, or a reward that does not apply counts as 0 of something."""
    functions = {"one": lambda completions, **_: [float(c[0]["content"] == "a") for c in completions]}
    rewards = make({"one": 2.0, "length": 0.5}, functions=functions)
    group = answers("q")
    one, length = (rewards.score(name, group, 2).values for name in rewards.names)
    assert (one, length) == ([1.0, 0.0], [1 - 1 / 8, 1 - 2 / 8])
    totals = [rewards.total({"one": a, "length": b}) for a, b in zip(one, length, strict=True)]
    assert totals == [2 + 0.5 * 7 / 8, 0.5 * 6 / 8]
    assert rewards.total({"one": None, "length": 1.0}) == 0.5 and math.isnan(rewards.total({"one": math.nan}))


def test_a_function_by_import_path_gets_trls_arguments_group_by_group(make):
    """Goes red if columns, token ids or groups do not arrive as TRL would pass them, or a None becomes a number."""
    rewards = make({"psft_test_rewards:num_letters": 1.0, "psft_test_rewards:does_not_apply": 1.0})
    found = rewards.score("psft_test_rewards:num_letters", answers("x", "y", factor=3), 2)
    assert found.values == [3.0] * 4 and not found.failures
    assert rewards.score("psft_test_rewards:does_not_apply", answers("x"), 2).values == [2.0, None]


@pytest.mark.parametrize(
    ("function", "reason", "failed"),
    [
        ("raises", "KeyError", [0, 1]),
        ("not_a_number", "not finite", [1]),
        ("mis_sized", "3 rewards for 2 answers", [0, 1]),
        ("no_list", "not a list of numbers", [0, 1]),
        ("computes_for_ever", "timed out", [0, 1]),
        ("waits_for_ever", "timed out", [0, 1]),
        ("dies", "worker process died", [0, 1]),
    ],
)
def test_every_way_to_fail_is_reported_with_its_prompt_and_handled_as_configured(
    make, monkeypatch, caplog, function, reason, failed
):
    """Goes red if a failure becomes a silent 0, takes a neighbour with it, or is not counted."""
    monkeypatch.setattr(pool, "SILENCE_S", 0.5)
    monkeypatch.setattr(pool, "START_S", 60.0)
    name = f"psft_test_rewards:{function}"
    with caplog.at_level(logging.WARNING):
        zero = make({name: 1.0}, on_failure="zero_and_count")
        found = zero.score(name, answers("bad", "good"), 2)
    assert found.values == [0.0 if i in failed else 1.0 for i in range(4)]
    assert [failure.index for failure in found.failures] == failed and zero.counts[name] == len(failed)
    assert all(failure.prompt == "bad" and reason in failure.reason for failure in found.failures)
    assert reason in caplog.text and "'bad'" in caplog.text
    assert zero.score(name, answers("good"), 2).values == [1.0, 1.0]  # the pool goes on

    if function in ("not_a_number", "mis_sized"):  # what is handled is the same for all
        dropped = make({name: 1.0}, on_failure="drop_group").score(name, answers("bad", "good"), 2)
        assert [math.isnan(value) for value in dropped.values] == [i in failed for i in range(4)]
        with pytest.raises(RunFailed, match=f"(?s){reason}.*'bad'.*on_reward_failure"):
            make({name: 1.0}, on_failure="stop").score(name, answers("good", "bad"), 2)


def test_a_callable_given_from_python_is_guarded_too(make):
    """Goes red if an exception of a person's own function ends the run without the prompt."""

    def broken(prompts, **_):
        raise ValueError("no")

    rewards = make({"broken": 1.0}, functions={"broken": broken}, on_failure="zero_and_count")
    found = rewards.score("broken", answers("q"), 2)
    assert found.values == [0.0, 0.0] and found.failures[0].reason.endswith("ValueError: no")


def test_graders_keep_their_workers_between_calls(make):
    """Goes red if every step of training pays again for the start of processes, or a grade is of another row."""
    pytest.importorskip("math_verify", reason="the graders' library is in the extra `eval`")
    rewards = make({"math": 1.0})
    group = [Answered({"gold": "4"}, [], rf"\boxed{{{n}}}", [1]) for n in (4, 5)]
    assert rewards.score("math", group, 2).values == [1.0, 0.0]
    (worker,) = rewards._pools["math"]._pool.workers
    assert rewards.score("math", group[::-1], 2).values == [0.0, 1.0]
    assert rewards._pools["math"]._pool.workers == [worker] and worker.process.poll() is None
    rewards.close()
    assert worker.process.poll() is not None


@pytest.mark.parametrize(
    ("weights", "settings", "more", "message"),
    [
        ({}, {}, {}, "rewards is empty"),
        ({"maths": 1}, {}, {}, "Did you mean math?"),
        ({"format": 0}, {}, {}, "weight of reward format is 0"),
        ({"format": math.nan}, {}, {}, "weight of reward format is nan"),
        ({"format": 1}, {"math": {}}, {}, "none of the rewards"),
        ({"format": 1}, {"format": {"forme": "boxed"}}, {}, "did|has no setting"),
        ({"a:b": 1}, {"a:b": {"x": 1}}, {}, "columns of the data"),
        ({"format": 1}, {}, {"on_failure": "ignore"}, "must be one of stop"),
        ({"format": 1}, {}, {"time_limit": 0}, "above 0 seconds"),
    ],
)
def test_what_cannot_be_used_is_refused(make, weights, settings, more, message):
    with pytest.raises(RequestError, match=message):
        make(weights, settings, **more)


@pytest.mark.parametrize("path", ["psft_no_module:f", "psft_test_rewards:absent", "psft_test_rewards:NOT_CALLABLE"])
def test_a_function_that_is_not_there_is_said_before_anything_is_loaded(make, path):
    with pytest.raises(RequestError, match="cannot be imported|not a function"):
        make({path: 1.0}).prepare()


def test_a_row_without_what_a_reward_needs_is_said(make):
    """Goes red if the field is not named, or the reward."""
    rewards = make({"choice": 1.0})
    rewards.check({"gold": "B"}, [])
    with pytest.raises(RequestError, match="reward choice: field 'gold' is missing"):
        rewards.check({}, [])
