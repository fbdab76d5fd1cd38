r"""Mathematics: is the answer of a response the gold one? By two policies, always both, side by side.

    strict   the last balanced \boxed{...} equals the gold answer (`equality`)
    psft     as the script of the paper grades: the last box, or what follows "The answer is", or what math-verify finds
             in the whole response equals it, within a relative tolerance of 1e-4

Source of the second: the evaluation script of zwhong714/PSFT. Left out of it: its rule that an answer off by a factor
of 100 is right (percent), and its crash on gold answers that are numbers. What `strict` takes, `psft` takes too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from psft.errors import RequestError
from psft.rewards import symbolic
from psft.rewards.base import Grade, text_field
from psft.rewards.boxed import is_box, last_box, stated_answer
from psft.rewards.equality import Verdict, answers_equal
from psft.rewards.notation import gold_texts, spelt

POLICIES = ("strict", "psft")
PAPER_TOLERANCE = 1e-4
"""Relative, between numbers, under `psft`."""


class MathGrader:
    """Grades `response` against `gold`: text, a number, or a list of which any is right.

    Nothing bounds the time an expression takes: grade through `psft.rewards.grade_rows`, which does.

    Args:
        policy: whose verdict is the score; the other one stands in the details.
        require_boxed: whether an answer has to be in a box. If not, `####`, "the answer is" and what math-verify finds
            in the whole response are tried after the box (GSM8K). Concerns `strict` alone.
        relative_tolerance: of `strict`, between numbers. 0: six correct digits of a decimal, else exact.
    """

    name = "math"
    is_quick = False

    def __init__(self, policy: str = "strict", require_boxed: bool = True, relative_tolerance: float = 0.0) -> None:
        if policy not in POLICIES:
            raise RequestError(f"policy={policy!r} is not known; it is one of {', '.join(POLICIES)}.")
        if not 0 <= relative_tolerance < 1:
            raise RequestError(f"relative_tolerance={relative_tolerance!r} must be 0 or more and below 1.")
        self.policy = policy
        self.require_boxed = require_boxed
        self.relative_tolerance = relative_tolerance

    def prepare(self) -> None:
        symbolic.load()

    def check(self, row: Mapping[str, Any]) -> None:
        text_field(row, "response")
        if "gold" not in row:
            raise RequestError("field 'gold' is missing. Give the right answer as text, a number or a list of those.")
        gold_texts(row["gold"])

    def __call__(self, row: Mapping[str, Any]) -> Grade:
        self.check(row)
        golds, response = tuple(gold_texts(row["gold"])), row["response"]
        box = last_box(response)
        extracted = box if box is not None or self.require_boxed else _unboxed(response)
        strict = _verdict(golds, extracted, self.relative_tolerance)
        score = {"strict": float(bool(strict.is_equal))}
        loose = strict if strict.is_equal else self._loose(golds, response, box)
        score["psft"] = float(bool(loose.is_equal))
        if self.policy == "strict":
            return Grade(score["strict"], extracted, strict.reason, score)
        return Grade(score["psft"], extracted if extracted is not None else _unboxed(response), loose.reason, score)

    def _loose(self, golds: tuple[str, ...], response: str, box: str | None) -> Verdict:
        """The three ways of the paper's script, one after the other."""
        verdict = _verdict(golds, box, PAPER_TOLERANCE)
        stated = stated_answer(response)
        if not verdict.is_equal and stated is not None and not is_box(stated, box):
            verdict = _any(verdict, _verdict(golds, stated, PAPER_TOLERANCE), "the stated answer is ")
        if not verdict.is_equal and (found := symbolic.parse_response(response)):
            same = any(symbolic.expressions_equal(_parsed(gold), found, PAPER_TOLERANCE) for gold in golds)
            verdict = _any(verdict, Verdict(same, "equal by math-verify on the whole response"), "")
        return verdict


def _any(first: Verdict, second: Verdict, words: str) -> Verdict:
    return Verdict(True, words + second.reason) if second.is_equal else first


def _parsed(gold: str) -> tuple[Any, ...]:
    return symbolic.parse_answer(spelt(gold))


@functools.lru_cache(maxsize=100_000)
def _verdict(golds: tuple[str, ...], answer: str | None, tolerance: float) -> Verdict:
    """Against each gold answer; samples of one problem often give the same answer, hence remembered."""
    if answer is None:
        return Verdict(None, "no answer found")
    verdict = Verdict(False, "not equal")
    for gold in golds:
        verdict = answers_equal(gold, answer, tolerance)
        if verdict.is_equal:
            break
    return verdict


def _unboxed(response: str) -> str | None:
    """The answer of a response without a box."""
    stated = stated_answer(response)
    if stated is not None:
        return stated
    found = symbolic.parse_response(response)
    return str(found[-1]) if found and re.search(r"\S", str(found[-1])) else None
