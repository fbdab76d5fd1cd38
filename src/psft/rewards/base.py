"""What a grader takes and gives: a row with a response in, a score with its reason out.

A grader is a pure function of its row. It never guesses: where no answer is found, `extracted` is None and the score 0,
so that a reader of many grades can count how often that happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from psft.errors import RequestError

TIMED_OUT = "timed out"
"""How the reason of a grade begins whose row took longer than it may."""


@dataclass(frozen=True)
class Grade:
    """What a grader says of one response.

    score: 0.0 or 1.0; reasoning-gym's scorers and rewards may say something else. extracted: the answer found in the
    response; None = none was found, which is counted and never guessed. reason: in a few words, as "equal as numbers".
    details: what else the grader knows, JSON values by name; for mathematics {"strict": 0.0, "psft": 1.0}.
    is_failure: the row could not be graded (an exception, no time or memory left): the score says nothing about it.
    """

    score: float
    extracted: str | None
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)
    is_failure: bool = False

    @property
    def is_timed_out(self) -> bool:
        return self.reason.startswith(TIMED_OUT)


class Grader(Protocol):
    """Grades one row: a mapping with `response` and the fields of its kind; other fields are ignored.

    name: as `get_grader` knows it. is_quick: every row takes bounded, short time, so it may be graded where one stands;
    other graders belong in worker processes (`grade_rows`), which can be stopped.
    """

    name: str
    is_quick: bool

    def prepare(self) -> None:
        """Import and load what the first row needs, so that no row's time limit pays for it.

        Raises:
            RequestError: a package or a file that the grader needs is not there.
        """

    def check(self, row: Mapping[str, Any]) -> None:
        """Look at the row's fields without grading.

        Raises:
            RequestError: a field is missing or of the wrong type.
        """

    def __call__(self, row: Mapping[str, Any]) -> Grade:
        """Grade the row.

        Raises:
            RequestError: as `check`.
        """


def text_field(row: Mapping[str, Any], name: str) -> str:
    """A field that must be text.

    Raises:
        RequestError: it is missing or something else.
    """
    value = row.get(name)
    if isinstance(value, str):
        return value
    found = "is missing" if name not in row else f"is {type(value).__name__}, not text"
    raise RequestError(f"field '{name}' {found}. Give it as text (an empty answer is an empty text).")
