"""Rewards for how an answer is written, whatever it says: its form, its length, and DAPO's overlong punishment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from psft.errors import RequestError
from psft.rewards.base import Grade, text_field
from psft.rewards.boxed import last_box

_FORMS = {
    "answer_tag": re.compile(r"<answer>\s*\S.*?</answer>\s*", re.DOTALL),
    "think_answer": re.compile(r"\s*<think>.*?</think>\s*<answer>\s*\S.*?</answer>\s*", re.DOTALL),
}


def soft_overlong_punishment(num_tokens: int, *, max_completion_length: int, buffer: int) -> float:
    """What an answer of `num_tokens` tokens loses: 0 up to max - buffer, then linearly to -1 at max, -1 beyond.

    Source: DAPO, arXiv:2503.14476, equation 13. Table 7 of the paper of PSFT: a buffer of 2k tokens under 10k.

    >>> [soft_overlong_punishment(n, max_completion_length=10, buffer=4) for n in (6, 7, 10, 11)]
    [0.0, -0.25, -1.0, -1.0]
    """
    beyond = num_tokens - (max_completion_length - buffer)
    return -min(max(beyond, 0) / buffer, 1.0) + 0.0  # + 0.0: no negative zero


class _Quick:
    """What the rewards of this file have in common: nothing to load, no row that takes long."""

    is_quick = True

    def prepare(self) -> None:
        """Nothing to load."""


class OverlongPunishment(_Quick):
    """Scores `num_tokens` from -1 to 0: see `soft_overlong_punishment`."""

    name = "overlong"

    def __init__(self, max_completion_length: int, buffer: int) -> None:
        if not 1 <= buffer <= max_completion_length:
            raise RequestError(
                f"overlong_buffer={buffer} must lie between 1 and max_completion_length={max_completion_length} tokens."
            )
        self.max_completion_length, self.buffer = max_completion_length, buffer

    def check(self, row: Mapping[str, Any]) -> None:
        _num_tokens(row)

    def __call__(self, row: Mapping[str, Any]) -> Grade:
        length = _num_tokens(row)
        score = soft_overlong_punishment(length, max_completion_length=self.max_completion_length, buffer=self.buffer)
        return Grade(score, None, f"{length} tokens")


class LengthReward(_Quick):
    """Scores `num_tokens` from 1 (at most `shortest`) linearly to 0 (at least `longest`): a push towards short answers.

    Args:
        shortest: tokens. longest: tokens; default max_completion_length.
    """

    name = "length"

    def __init__(self, max_completion_length: int, shortest: int = 0, longest: int | None = None) -> None:
        self.shortest, self.longest = shortest, max_completion_length if longest is None else longest
        if not 0 <= self.shortest < self.longest:
            raise RequestError(f"length: shortest={self.shortest} must be 0 or more and below longest={self.longest}.")

    def check(self, row: Mapping[str, Any]) -> None:
        _num_tokens(row)

    def __call__(self, row: Mapping[str, Any]) -> Grade:
        length = _num_tokens(row)
        share = (length - self.shortest) / (self.longest - self.shortest)
        return Grade(1.0 - min(max(share, 0.0), 1.0), None, f"{length} tokens")


class FormatReward(_Quick):
    r"""Scores `response` 1 if it has the form, else 0.

    Args:
        form: boxed (a balanced, non-empty `\boxed{}`), answer_tag (exactly one `<answer>...</answer>`, at the end),
            think_answer (`<think>...</think><answer>...</answer>` and nothing else).
        pattern: a regular expression of your own that the whole response has to match; `form` is not looked at then.
    """

    name = "format"

    def __init__(self, form: str = "boxed", pattern: str | None = None) -> None:
        if pattern is None and form not in ("boxed", *_FORMS):
            raise RequestError(f"format: form={form!r} is not known; it is one of boxed, {', '.join(_FORMS)}.")
        self.form = form
        try:
            self.pattern = None if pattern is None else re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise RequestError(f"format: pattern={pattern!r} is no regular expression: {error}. Correct it.") from error
        # a person's own expression may search for ever: it belongs into a worker process, which is stopped
        self.is_quick = pattern is None

    def check(self, row: Mapping[str, Any]) -> None:
        text_field(row, "response")

    def __call__(self, row: Mapping[str, Any]) -> Grade:
        response = text_field(row, "response")
        if self.pattern is not None:
            has_form = self.pattern.fullmatch(response) is not None
        elif self.form == "boxed":
            has_form = last_box(response) is not None
        elif self.form == "answer_tag":
            start = response.find("<answer>")
            has_form = (
                start >= 0 and response.count("<answer>") == 1 and bool(_FORMS[self.form].fullmatch(response, start))
            )
        else:
            has_form = response.count("<answer>") == 1 and bool(_FORMS[self.form].fullmatch(response))
        return Grade(float(has_form), None, "has the form" if has_form else "has not the form")


def _num_tokens(row: Mapping[str, Any]) -> int:
    length = row.get("num_tokens")
    if type(length) is not int or length < 0:
        raise RequestError(f"field 'num_tokens' is {length!r}. Give the answer's length in tokens.")
    return length
