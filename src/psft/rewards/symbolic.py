"""Expressions by math-verify: parsing LaTeX to sympy, and equality of what was parsed. Nothing here is bounded in time.

math-verify's own alarms are off: the worker that grades counts the time. Numbers, also closed ones as 2 sqrt(10), are
compared here, relatively; math-verify compares the rest (sets, relations, matrices, expressions with variables).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from typing import Any

from psft.errors import RequestError
from psft.rewards import latex
from psft.rewards.disproof import surely_differ

_MISREAD = (
    (re.compile(r"(?<![A-Za-z\\])E(?=_)"), r"\\Xi"),
    (re.compile(r"\\gamma(?![A-Za-z])(?!\s*\()"), r"\\Upsilon"),
)
"""Names that the parser takes for numbers or functions, as E_1 and \\gamma^2 - 1, and letters that stand for them."""
_NOISY = ("math_verify", "latex2sympy2_extended", "latex2sympy2")
_ROUNDED = 5e-6
"""Relative difference allowed where one side was written as a decimal: six significant digits."""
_EXACT = 1e-15
"""Relative difference of two closed numbers, computed to 40 digits, that counts as none."""


def load() -> None:
    """Import math-verify.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import math_verify
    except ImportError as error:
        raise RequestError(f'grader math needs math-verify ({error}). Install it: pip install "psft[eval]".') from error
    latex.quicken()
    for name in _NOISY:  # it warns, once a process, that its alarms are off
        logging.getLogger(name).setLevel(logging.ERROR)
    assert math_verify.parse


@functools.lru_cache(maxsize=latex.MOST_REMEMBERED)
def parse_answer(text: str) -> tuple[Any, ...]:
    """What math-verify reads in one answer: a sympy object and the text, only the text, or nothing.

    Units are taken off before (`notation.without_unit`): math-verify would take the m off 6m. An answer that cannot be
    parsed stays text; math-verify would go on to a fraction inside it.
    """
    import math_verify

    usual = math_verify.LatexExtractionConfig().normalization_config
    config = math_verify.LatexExtractionConfig(
        boxed_match_priority=0, normalization_config=dataclasses.replace(usual, units=False)
    )
    for name, letter in _MISREAD:
        text = name.sub(letter, text)
    return tuple(math_verify.parse(rf"\boxed{{{text}}}", [config], extraction_mode="first_match", parsing_timeout=None))


def parse_response(text: str) -> tuple[Any, ...]:
    """What math-verify takes for the answer in a whole response: LaTeX before plain numbers, the last first."""
    import math_verify

    return tuple(math_verify.parse(text, parsing_timeout=None))


def expressions_equal(gold: tuple[Any, ...], answer: tuple[Any, ...], tolerance: float = 0.0) -> bool:
    """Whether any reading of the answer equals one of the gold. What has no value equals nothing."""
    if any(_is_undefined(expression) for expression in (*gold[:1], *answer[:1])):
        return False
    if gold and answer:
        verdict = _numbers_equal(gold[0], answer[0], tolerance)
        if verdict is not None:
            return verdict
    try:
        hash((gold, answer))
    except TypeError:  # a matrix
        return _verified.__wrapped__(gold, answer)
    return _verified(gold, answer)


@functools.lru_cache(maxsize=latex.MOST_REMEMBERED)
def _verified(gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    """math-verify's verdict; both policies, and every sample that gives the answer, ask for it."""
    import math_verify

    if gold and answer and gold[1:] != answer[1:] and surely_differ(gold[0], answer[0]):
        return False
    return bool(math_verify.verify(list(gold), list(answer), allow_set_relation_comp=True, timeout_seconds=None))


def _is_undefined(expression: Any) -> bool:
    """Whether a division by zero is in it; to sympy all of them are one."""
    from sympy import nan, zoo

    return hasattr(expression, "has") and bool(expression.has(nan, zoo))


def _numbers_equal(gold: Any, answer: Any, tolerance: float) -> bool | None:
    """Whether two closed numbers are equal, or None if they are not both numbers that can be computed."""
    from sympy import Expr, Float

    if not (isinstance(gold, Expr) and isinstance(answer, Expr) and gold.is_number and answer.is_number):
        return None
    try:
        one, other = gold.doit(), answer.doit()
        if one.is_finite is False or other.is_finite is False:
            return bool(one == other)  # an infinite difference is within any share of an infinite size
        if one.is_Rational and other.is_Rational:
            difference, size = abs(one - other), max(abs(one), abs(other))
            return bool(difference == 0 or difference <= tolerance * size)
        difference, size = abs((one - other).evalf(40)), max(abs(one.evalf(40)), abs(other.evalf(40)))
        is_rounded = bool(gold.atoms(Float) or answer.atoms(Float))
        return bool(difference <= max(tolerance, _ROUNDED if is_rounded else _EXACT) * size)
    except (TypeError, ValueError, AttributeError):  # a number without a value: infinite, undefined, not evaluated
        return None
