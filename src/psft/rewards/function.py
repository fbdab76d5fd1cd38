"""A reward function of the user's own, by import path, with TRL's signature:

    def my_reward(prompts, completions, completion_ids, **columns) -> list[float]: ...

It is called in a worker process, for the answers of one prompt at a time, so that whatever it does has a prompt to be
reported with, and can be stopped. Every argument is a list with an entry for each answer: `prompts` and `completions`
hold lists of messages, `completion_ids` token ids, `columns` the fields of the data.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from psft.errors import RequestError, first_line
from psft.rewards.base import Grade


class FunctionReward:
    """Calls `function` on the answers of a row: `arguments`, the keyword arguments, and `num_answers`, their number.

    The grade's score is the mean; details["scores"] has one for each answer: a number, null where it was NaN or
    infinite, which is a failure, or "none" where the function says that it does not apply.
    """

    name = "function"
    is_quick = False

    def __init__(self, function: str) -> None:
        self.path = function
        self._function: Callable[..., Any] | None = None

    def prepare(self) -> None:
        module, _, attribute = self.path.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever a module of the user's raises when it is imported
            raise RequestError(
                f"reward {self.path}: cannot be imported: {type(error).__name__}: {first_line(error)}. Give "
                "module:function, importable from the folder you are in or from PYTHONPATH."
            ) from error
        if not callable(function):
            raise RequestError(f"reward {self.path} is a {type(function).__name__}, not a function.")
        self._function = function

    def check(self, row: Mapping[str, Any]) -> None:
        """Every row is made by `psft.rewards.reward_set`."""

    def __call__(self, row: Mapping[str, Any]) -> Grade:
        if self._function is None:
            self.prepare()
        assert self._function is not None
        try:
            given = self._function(**row["arguments"])
        except RequestError as error:  # a message of its own is no verdict of psft's
            raise RuntimeError(str(error)) from error
        return checked_scores(given, row["num_answers"])


def checked_scores(given: Any, num_answers: int) -> Grade:
    """What a function returned, as a grade; a failure if it is not one number (or None) for each answer."""
    try:
        scores = [None if score is None else float(score) for score in given]
    except (TypeError, ValueError) as error:
        said = f"returned {type(given).__name__}, not a list of numbers: {first_line(error)}"
        return Grade(0.0, None, said, is_failure=True)
    if len(scores) != num_answers:
        return Grade(0.0, None, f"returned {len(scores)} rewards for {num_answers} answers", is_failure=True)
    finite = [score for score in scores if score is not None and math.isfinite(score)]
    shown = ["none" if score is None else score if math.isfinite(score) else None for score in scores]
    return Grade(sum(finite) / len(finite) if finite else 0.0, None, "by your function", {"scores": shown})
