r"""Plain numbers, exactly: `-1,234.5`, `4.5e33`, `6.6\times10^{-34}`, `\frac{14}{3}`, `1\frac{4}{5}`, `-3./2`.

They are compared here and not by math-verify, whose tolerance is absolute: to it 6.6e-34 and 9.1e-31 are equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

SIX_DIGITS = Fraction(5, 10**6)
"""Relative: how far a decimal of six correct significant digits may be from what it stands for."""
_MOST_DIGITS = 5000
"""An exponent beyond this is not computed with: such a number is left to the symbolic comparison and its time limit."""
_LONGEST = 1000
"""Characters. A model that repeats a digit without end has written no number; Python refuses those of 4,300 digits."""

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_POWER_OF_TEN = r"10\s*\^\s*(?:\{\s*([-+]?\s*\d+)\s*\}|([-+]?\d+))"
_SIGN = r"([-+]?)\s*"
_FORMS = {
    "decimal": re.compile(rf"{_SIGN}({_DECIMAL})(?:[eE]([-+]?\d+))?"),
    "times": re.compile(rf"{_SIGN}({_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*{_POWER_OF_TEN}"),
    "power": re.compile(rf"{_SIGN}{_POWER_OF_TEN}"),
    "fraction": re.compile(rf"{_SIGN}\\frac\{{\s*([-+]?)\s*({_DECIMAL})\s*\}}\{{\s*([-+]?)\s*({_DECIMAL})\s*\}}"),
    "ratio": re.compile(rf"{_SIGN}({_DECIMAL})\s*/\s*([-+]?)({_DECIMAL})"),
    "mixed": re.compile(rf"{_SIGN}(\d+)\s*\\frac\{{\s*(\d+)\s*\}}\{{\s*(\d+)\s*\}}"),
}


@dataclass(frozen=True)
class Number:
    """A number as written. is_decimal: it was written as a decimal, so it may stand for a number that has none."""

    value: Fraction
    is_decimal: bool


def parse_number(text: str) -> Number | None:
    """The number that all of the text (as `notation.spelt` writes it) is, or None.

    >>> parse_number(r"6.6\\times10^{-34}").value == Fraction(66, 10**35), parse_number("x")
    (True, None)
    """
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    while text.startswith("{") and text.endswith("}") or re.fullmatch(r"\([^(),]*\)", text):
        text = text[1:-1].strip()
    for form, pattern in _FORMS.items():
        found = pattern.fullmatch(text)
        if found is not None:
            return _value(form, found.groups())
    return None


def _value(form: str, groups: tuple[str | None, ...]) -> Number | None:
    sign, *parts = (group.replace(" ", "") if group else "" for group in groups)
    one = -1 if sign == "-" else 1
    if form in ("decimal", "times", "power"):
        digits = "1" if form == "power" else parts.pop(0)
        exponent = int(next(filter(None, parts), "0")) if sum(map(len, parts)) < 9 else _MOST_DIGITS + 1
        if abs(exponent) > _MOST_DIGITS:
            return None
        return Number(
            one * Fraction(digits) * Fraction(10) ** exponent, "." in digits or form != "power" and exponent < 0
        )
    if form == "mixed":
        whole, numerator, denominator = map(int, parts)
        return Number(one * (whole + Fraction(numerator, denominator)), False) if denominator else None
    signs = [part for part in parts if part in ("", "+", "-")]
    above, below = (Fraction(part) for part in parts if part not in ("", "+", "-"))
    one *= (-1) ** signs.count("-")
    return Number(one * above / below, False) if below else None


def numbers_equal(gold: Number, answer: Number, tolerance: float = 0.0) -> bool:
    """Whether they are the same number, or within `tolerance` of each other, relative to the larger.

    A decimal equals a fraction that has no finite decimal form where six significant digits agree: 0.333333 is 1/3, and
    0.3333 is not. Everything else is exact: 1.60005 is not 1.6.
    """
    if gold.value == answer.value:
        return True
    is_rounded = gold.is_decimal and not _is_finite(answer) or answer.is_decimal and not _is_finite(gold)
    allowed = max(Fraction(tolerance), SIX_DIGITS if is_rounded else Fraction(0))
    return abs(gold.value - answer.value) <= allowed * max(abs(gold.value), abs(answer.value))


def _is_finite(number: Number) -> bool:
    """Whether its decimal form ends: no prime but 2 and 5 in the denominator."""
    rest = number.value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
