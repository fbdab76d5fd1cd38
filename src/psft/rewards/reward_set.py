"""What an answer is worth in reinforcement learning: rewards, weighed and added, none of which can hang the run.

    answers of some prompts -> one score for each reward and answer -> the weighed sum

Graders and functions by import path run in worker processes that stay (`psft.rewards.pool`). A reward that raises, says
NaN, takes too long, kills its process or returns too few numbers has failed for those answers. A failure is reported
with its prompt, counted, and then handled as `on_failure` says; it never becomes a zero that nobody knows of.

    stop             the run ends with the reason
    zero_and_count   that reward is 0 for that answer
    drop_group       no answer to that prompt is trained on; dynamic sampling takes another prompt
"""

from __future__ import annotations

import difflib
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psft.errors import RequestError, RunFailed, first_line, shown
from psft.machine import local_ranks, logical_cores
from psft.rewards.base import Grade
from psft.rewards.function import checked_scores
from psft.rewards.pool import GradingPool
from psft.rewards.registry import reward_names

logger = logging.getLogger(__name__)

ON_FAILURE = ("stop", "zero_and_count", "drop_group")
_SAID = 10
"""Failures of a run that are said in the log; every one is counted and kept for the caller."""


@dataclass(frozen=True)
class Answered:
    """One answer to one prompt.

    row: the fields of the data. prompt: a list of messages. tokens: ids of the answer, its end token included.
    """

    row: Mapping[str, Any]
    prompt: Sequence[Mapping[str, str]]
    response: str
    tokens: Sequence[int]

    @property
    def question(self) -> str:
        """The last turn of the prompt."""
        return self.prompt[-1]["content"] if self.prompt else ""

    def fields(self) -> dict[str, Any]:
        """What a grader is given."""
        return {"prompt": self.question, **self.row, "response": self.response, "num_tokens": len(self.tokens)}


@dataclass(frozen=True)
class Failure:
    """A reward that gave no score. index: of the answer among those scored together."""

    reward: str
    index: int
    reason: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Scores:
    """What one reward says of some answers.

    values: a number each; None = the reward does not apply to this answer; where it failed what `on_failure` makes of
    it: 0.0, or NaN for an answer whose group is dropped. failures: all of them.
    """

    values: list[float | None]
    failures: list[Failure]


class RewardSet:
    """The rewards of a run by name, with their weights.

    Args:
        weights: name -> weight. A name is one of `reward_names()`, or module:function (see `psft.rewards.function`).
        settings: name -> settings of that reward, as `get_grader` takes them.
        max_completion_length: tokens; what `overlong` and `length` measure against.
        on_failure: one of `ON_FAILURE`.
        time_limit: processor seconds that grading one answer may take; for a function, the answers of one prompt. A
            reward that waits instead of computing is ended after ten times as long and `pool.SILENCE_S` more.
        num_workers: processes for each reward that needs them; default: the processors, shared with the other ranks.
        functions: name -> a Python callable with TRL's signature, called in this process: no time limit holds there.
    Raises:
        RequestError: an unknown reward, a setting or weight that cannot be used, an empty set.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        max_completion_length: int,
        on_failure: str = "stop",
        time_limit: float = 5.0,
        num_workers: int | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.functions = dict(functions or {})
        problems = _problems(weights, settings or {}, on_failure, time_limit, self.functions)
        if problems:
            raise RequestError("; ".join(problems) + ".")
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.on_failure = on_failure
        self.counts: Counter[str] = Counter()
        """Failures of the run by reward."""
        self._pools: dict[str, GradingPool] = {}
        workers = num_workers or max(logical_cores() // local_ranks(), 1)
        for name in self.weights:
            if name in self.functions:
                continue
            of_it = dict((settings or {}).get(name, {}))
            if name in ("overlong", "length"):
                of_it.setdefault("max_completion_length", max_completion_length)
            is_path = ":" in name
            kind = "function" if is_path else name
            if is_path:
                of_it = {"function": name}
            try:
                self._pools[name] = GradingPool(kind, num_workers=workers, time_limit=time_limit, **of_it)
            except RequestError as error:
                raise RequestError(f"reward {name}: {error}") from error

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    def prepare(self) -> None:
        """Load what graders need in this process once, so that what is not installed is said before a model is loaded.

        Raises:
            RequestError: a package, a module or a function is not there.
        """
        for pool in self._pools.values():
            pool.grader.prepare()

    def check(self, row: Mapping[str, Any], prompt: Sequence[Mapping[str, str]]) -> None:
        """Look whether a row of the data has what every reward needs.

        Raises:
            RequestError: a field is missing or cannot be used.
        """
        fields = Answered(row, prompt, "", ()).fields()
        for name, pool in self._pools.items():
            try:
                pool.grader.check(fields)
            except RequestError as error:
                raise RequestError(f"reward {name}: {error}") from error

    def score(self, name: str, answers: Sequence[Answered], group_size: int) -> Scores:
        """What the reward `name` says of answers that lie group by group, `group_size` to a prompt.

        Raises:
            RunFailed: it failed and `on_failure` is stop. RequestError: a row lacks what the reward needs.
        """
        grades = self._grades(name, answers, group_size)
        values: list[float | None] = []
        failures = []
        for index, (answer, grade) in enumerate(zip(answers, grades, strict=True)):
            reason = _failure_of(grade)
            if reason is None:
                values.append(None if grade.details.get("applies") is False else grade.score)
                continue
            failures.append(Failure(name, index, reason, answer.question, answer.response))
            values.append(math.nan if self.on_failure == "drop_group" else 0.0)
        for failure in failures:
            self._report(failure)
        return Scores(values, failures)

    def total(self, parts: Mapping[str, float | None]) -> float:
        """The weighed sum; a reward that does not apply (None) is left out. NaN if one is."""
        return sum(self.weights[name] * value for name, value in parts.items() if value is not None)

    def close(self) -> None:
        """End the workers."""
        for pool in self._pools.values():
            pool.close()

    def _grades(self, name: str, answers: Sequence[Answered], group_size: int) -> list[Grade]:
        if name not in self.functions and ":" not in name:
            return self._pools[name].grade(answer.fields() for answer in answers)
        groups = [answers[i : i + group_size] for i in range(0, len(answers), group_size)]
        if name in self.functions:
            of_groups = [_call(self.functions[name], group) for group in groups]
        else:
            rows = [{"arguments": _arguments(group), "num_answers": len(group)} for group in groups]
            of_groups = self._pools[name].grade(rows)
        return [grade for group, whole in zip(groups, of_groups, strict=True) for grade in _one_each(whole, len(group))]

    def _report(self, failure: Failure) -> None:
        self.counts[failure.reward] += 1
        said = (
            f"reward {failure.reward} {failure.reason}, for the prompt {shown(repr(failure.prompt), 160)} "
            f"and the answer {shown(repr(failure.response), 160)}"
        )
        if self.on_failure == "stop":
            raise RunFailed(
                f"{said}. Mend the reward, or go on all the same: on_reward_failure=zero_and_count or drop_group."
            )
        number = sum(self.counts.values())
        if number <= _SAID:
            makes = "it counts 0" if self.on_failure == "zero_and_count" else "its group is dropped"
            more = " Further failures are counted and not shown." if number == _SAID else ""
            logger.warning("%s; %s.%s", said, makes, more)


def _problems(
    weights: Mapping[str, float],
    settings: Mapping[str, Mapping[str, Any]],
    on_failure: str,
    time_limit: float,
    functions: Mapping[str, Any],
) -> list[str]:
    problems = [] if weights else ["rewards is empty: nothing would be learnt. Give at least one, e.g. math=1"]
    known = [*reward_names(), *functions]
    for name, weight in weights.items():
        if name not in known and ":" not in name:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            advice = f"Did you mean {close[0]}?" if close else f"There are {', '.join(known)}, and module:function"
            problems.append(f"unknown reward {name!r}. {advice}")
        if not math.isfinite(weight) or weight == 0:
            problems.append(f"the weight of reward {name} is {weight:g}; give a number that is not 0, or leave it out")
    for name in settings:
        if name not in weights:
            problems.append(f"reward_settings has {name!r}, which is none of the rewards")
        elif ":" in name or name in functions:
            problems.append(
                f"reward_settings: {name} is a function and takes its settings from the columns of the data"
            )
        elif not isinstance(settings[name], Mapping):
            problems.append(f"reward_settings: those of {name} are no mapping")
    if on_failure not in ON_FAILURE:
        problems.append(f"on_reward_failure={on_failure} must be one of {', '.join(ON_FAILURE)}")
    if not time_limit > 0:
        problems.append(f"reward_time_limit={time_limit:g} must be above 0 seconds")
    return problems


def _arguments(group: Sequence[Answered]) -> dict[str, Any]:
    """The keyword arguments of TRL's signature for the answers of one prompt."""
    columns = {key: [answer.row.get(key) for answer in group] for key in group[0].row if key != "prompt"}
    return {
        **columns,
        "prompts": [list(answer.prompt) for answer in group],
        "completions": [[{"role": "assistant", "content": answer.response}] for answer in group],
        "completion_ids": [list(answer.tokens) for answer in group],
    }


def _call(function: Callable[..., Any], group: Sequence[Answered]) -> Grade:
    try:
        given = function(**_arguments(group))
    except (RequestError, RunFailed):
        raise
    except Exception as error:  # whatever a function of the user's raises
        said = f"could not be graded: {type(error).__name__}: {shown(first_line(error), 120)}"
        return Grade(0.0, None, said, is_failure=True)
    return checked_scores(given, len(group))


def _one_each(whole: Grade, size: int) -> list[Grade]:
    """The grade of a group as one for each of its answers."""
    if whole.is_failure:
        return [whole] * size
    made = []
    for score in whole.details["scores"]:
        if score == "none":
            made.append(Grade(0.0, None, "does not apply", {"applies": False}))
        elif score is None:
            made.append(Grade(math.nan, None, whole.reason))
        else:
            made.append(Grade(score, None, whole.reason))
    return made


def _failure_of(grade: Grade) -> str | None:
    """Why the grade says nothing, or None."""
    if grade.is_failure:
        return grade.reason
    return None if math.isfinite(grade.score) else "gave a number that is not finite"
