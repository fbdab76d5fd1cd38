"""Expressions by math-verify: parsing LaTeX to sympy, and equality of what was parsed. Nothing here is bounded in time.

math-verify's own alarms are off: the worker that grades counts the time. Numbers, also closed ones as 2 sqrt(10), are
compared here, relatively; math-verify compares the rest (sets, relations, matrices, expressions with variables).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from psft.errors import RequestError

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
    for name in _NOISY:  # it warns, once a process, that its alarms are off
        logging.getLogger(name).setLevel(logging.ERROR)
    assert math_verify.parse


@functools.lru_cache(maxsize=4096)
def parse_answer(text: str) -> tuple[Any, ...]:
    """What math-verify reads in one answer: a sympy object and the text, only the text, or nothing."""
    import math_verify

    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    return tuple(math_verify.parse(rf"\boxed{{{text}}}", config, parsing_timeout=None))


def parse_response(text: str) -> tuple[Any, ...]:
    """What math-verify takes for the answer in a whole response: LaTeX before plain numbers, the last first."""
    import math_verify

    return tuple(math_verify.parse(text, parsing_timeout=None))


def expressions_equal(gold: tuple[Any, ...], answer: tuple[Any, ...], tolerance: float = 0.0) -> bool:
    """Whether any reading of the answer equals one of the gold."""
    import math_verify

    if gold and answer:
        verdict = _numbers_equal(gold[0], answer[0], tolerance)
        if verdict is not None:
            return verdict
    return bool(math_verify.verify(list(gold), list(answer), timeout_seconds=None))


def _numbers_equal(gold: Any, answer: Any, tolerance: float) -> bool | None:
    """Whether two closed numbers are equal, or None if they are not both numbers that can be computed."""
    from sympy import Expr, Float

    if not (isinstance(gold, Expr) and isinstance(answer, Expr) and gold.is_number and answer.is_number):
        return None
    try:
        one, other = gold.doit(), answer.doit()
        if one.is_Rational and other.is_Rational:
            difference, size = abs(one - other), max(abs(one), abs(other))
            return bool(difference == 0 or difference <= tolerance * size)
        difference, size = abs((one - other).evalf(40)), max(abs(one.evalf(40)), abs(other.evalf(40)))
        is_rounded = bool(gold.atoms(Float) or answer.atoms(Float))
        return bool(difference <= max(tolerance, _ROUNDED if is_rounded else _EXACT) * size)
    except (TypeError, ValueError, AttributeError):  # a number without a value: infinite, undefined, not evaluated
        return None
