"""Whether an answer equals a gold answer: cheap and exact ways first, math-verify for what is left.

In order: the same text; both plain numbers (then that comparison is final, with percent signs and units looked at);
both words; both of several parts (`structure`), part by part; math-verify. An assignment's left side (`x = 5` for `5`)
and the base of a numeral (`52_8` for `52`) may be left out on one side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from psft.rewards.notation import Measured, spelt, without_thousands, without_unit, words_of
from psft.rewards.numbers import Number, numbers_equal, parse_number
from psft.rewards.structure import Parts, parts_of
from psft.rewards.symbolic import expressions_equal, parse_answer

_ASSIGNED = re.compile(
    r"\s*(\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\^\{?\\?\w+\}?)?(?:\([A-Za-z, ]+\))?)\s*(?:=|\\in(?![A-Za-z]))\s*(?![=<>])(.+)"
)
_IN_BASE = re.compile(r"\(?([0-9A-Fa-f]+)\)?_\{?\s*(?:\\text\s*\{)?(\d+)\}?\}?")


@dataclass(frozen=True)
class Verdict:
    """is_equal: None = the ways tried cannot tell. reason: in a few words."""

    is_equal: bool | None
    reason: str


_UNDECIDED = Verdict(None, "not decided")


def answers_equal(gold: str, answer: str, tolerance: float = 0.0) -> Verdict:
    """Compare two answers, texts as they stand in a data set or in a box.

    Args:
        tolerance: relative, for numbers. 0: equal as written, but for decimals of six correct digits (`numbers`).
    """
    gold, answer = spelt(gold), spelt(answer)
    if not answer:
        return Verdict(False, "the answer is empty")
    if _squeezed(gold) == _squeezed(answer):
        return Verdict(True, "equal as text")
    gold, answer = _without_shared_name(gold, answer)
    verdict = _compare(gold, answer, tolerance)
    if verdict.is_equal is not None:
        return verdict
    is_equal = expressions_equal(parse_answer(gold), parse_answer(answer), tolerance)
    return Verdict(is_equal, "equal by math-verify" if is_equal else "not equal by math-verify")


def _compare(gold: str, answer: str, tolerance: float) -> Verdict:
    if _squeezed(gold) == _squeezed(answer):
        return Verdict(True, "equal as text")
    for way in (_compare_in_base, _compare_measured, _compare_words, _compare_parts):
        verdict = way(gold, answer, tolerance)
        if verdict.is_equal is not None:
            return verdict
    return _UNDECIDED


def _squeezed(text: str) -> str:
    """The text without spaces and without braces round single letters, so that `x^{2}` is `x^2`."""
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"(?<![A-Za-z])\s+|\s+(?![A-Za-z])", "", text))


def _without_shared_name(gold: str, answer: str) -> tuple[str, str]:
    """Right sides, where one side alone names what it is about, or both name the same."""
    of_gold, of_answer = _ASSIGNED.fullmatch(gold), _ASSIGNED.fullmatch(answer)
    if of_gold and of_answer:
        is_same = _squeezed(of_gold.group(1)) == _squeezed(of_answer.group(1))
        return (
            (of_gold.group(2), of_answer.group(2))
            if is_same and not _has_relation(of_gold, of_answer)
            else (gold, answer)
        )
    if of_gold and not re.search(r"[=<>]|\\[lg]e", answer) and not _has_relation(of_gold):
        return of_gold.group(2), answer
    if of_answer and not re.search(r"[=<>]|\\[lg]e", gold) and not _has_relation(of_answer):
        return gold, of_answer.group(2)
    return gold, answer


def _has_relation(*found: re.Match[str]) -> bool:
    """Whether a right side goes on with another relation, as in `a = b = c` or `x = 1, x = 2`."""
    return any(re.search(r"[=<>]|\\[lg]e(?![A-Za-z])", one.group(2)) for one in found)


def _compare_in_base(gold: str, answer: str, tolerance: float) -> Verdict:
    of_gold, of_answer = _IN_BASE.fullmatch(_squeezed(gold)), _IN_BASE.fullmatch(_squeezed(answer))
    if of_gold is None and of_answer is None:
        return _UNDECIDED
    digits = [found.group(1) if found else text for found, text in ((of_gold, gold), (of_answer, answer))]
    bases = {int(found.group(2)) for found in (of_gold, of_answer) if found}
    if not all(re.fullmatch(r"[0-9A-Fa-f]+", text) for text in digits):
        return _UNDECIDED
    is_equal = len(bases) == 1 and digits[0].upper() == digits[1].upper()
    return Verdict(is_equal, "equal as numerals of a base" if is_equal else "not equal as numerals of a base")


def _compare_measured(gold: str, answer: str, tolerance: float) -> Verdict:
    """Plain numbers, with what they are measured in."""
    of_gold, of_answer = without_unit(gold), without_unit(answer)
    one, other = _number(of_gold), _number(of_answer)
    if one is None or other is None:
        return (
            _UNDECIDED
            if (of_gold.text, of_answer.text) == (gold, answer)
            else _compare_rest(of_gold, of_answer, tolerance)
        )
    if of_gold.unit and of_answer.unit and of_gold.unit != of_answer.unit:
        return Verdict(False, f"in {of_answer.unit}, gold in {of_gold.unit}")
    is_equal = numbers_equal(one, other, tolerance)
    if of_gold.is_percent != of_answer.is_percent:  # 62.5 % for 62.5, or for 0.625; but not 0.5 % for the share 0.5
        is_share = of_answer.is_percent and abs(one.value) < 1
        hundredth = Number(one.value / 100, True) if of_gold.is_percent else one
        other = Number(other.value / 100, True) if of_answer.is_percent else other
        is_equal = is_equal and not is_share or numbers_equal(hundredth, other, tolerance)
    return Verdict(is_equal, "equal as numbers" if is_equal else "not equal as numbers")


def _compare_rest(gold: Measured, answer: Measured, tolerance: float) -> Verdict:
    """What is no plain number on both sides, without its units."""
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return Verdict(False, f"in {answer.unit}, gold in {gold.unit}")
    if gold.is_percent != answer.is_percent:
        return _UNDECIDED
    return answers_equal(gold.text, answer.text, tolerance)


def _number(measured: Measured) -> Number | None:
    return parse_number(without_thousands(measured.text))


def _compare_words(gold: str, answer: str, tolerance: float) -> Verdict:
    one, other = words_of(gold), words_of(answer)
    if one is None or other is None:
        return _UNDECIDED
    return Verdict(one == other, "equal as words" if one == other else "not equal as words")


def _compare_parts(gold: str, answer: str, tolerance: float) -> Verdict:
    one, other = parts_of(gold), parts_of(answer)
    if one is None or other is None:
        return _UNDECIDED
    kinds = {one.kind, other.kind}
    if len(kinds) > 1 and kinds not in ({"list", "set"}, {"list", "()"}):
        return Verdict(False, "brackets of another kind") if one.is_ordered and other.is_ordered else _UNDECIDED
    if len(one.items) != len(other.items):
        return Verdict(False, f"{len(other.items)} parts, gold has {len(one.items)}")
    is_equal = (
        _ordered(one, other, tolerance) if one.is_ordered or other.is_ordered else _unordered(one, other, tolerance)
    )
    return Verdict(is_equal, "equal part by part" if is_equal else "a part differs")


def _ordered(gold: Parts, answer: Parts, tolerance: float) -> bool:
    return all(answers_equal(g, a, tolerance).is_equal for g, a in zip(gold.items, answer.items, strict=True))


def _unordered(gold: Parts, answer: Parts, tolerance: float) -> bool:
    """Whether the parts can be paired off; equality is as good as transitive, so the first partner will do."""
    rest = list(answer.items)
    for item in gold.items:
        partner = next((a for a in rest if answers_equal(item, a, tolerance).is_equal), None)
        if partner is None:
            return False
        rest.remove(partner)
    return True
