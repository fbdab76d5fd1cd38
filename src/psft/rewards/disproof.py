"""Expressions that have other values at the same places are not equal: told in a millisecond, where sympy takes forty.

    expressions   have other values at two places
    equations     one fails at a place where the other holds
    sets, tuples  one has an element that differs from every element of the other; of an interval these are its ends

Only that is told. What agrees, or has no value there, is left to those who prove equality. So are all differences below
a millionth, among them whatever was rounded, and all but elementary expressions: to evaluate a sum or an integral is no
quick way. Places lie near 1, where high powers stay in reach, and are the same in every process.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_DIGITS = 15
_LEAST = 1e-6
"""Relative to the larger value, or absolute where that is below 1."""
_ROUNDING = 1e-9
"""Likewise: below it, a difference is one of computing with 15 digits."""
_MOST_NODES = 300
_MOST_ELEMENTS = 12
_LARGEST_POWER = 10_000
"""Beyond this exponent a value may take longer than a proof."""
_STEPS = 12
"""In search of a place where an equation holds."""
_PLACES = ((1, 5003), (-1, 6007))
"""(sign, denominator): a symbol stands for 1 + sign * (1 to 1000) / denominator, a number made of its name."""

Values = Mapping[Any, Any]


def surely_differ(gold: Any, answer: Any) -> bool:
    """Whether two sympy objects are certainly unequal. False says nothing."""
    from sympy import Eq

    if isinstance(gold, Eq) and isinstance(answer, Eq):
        return _differ_somewhere(any, _equations_differ, gold, answer)
    some, others = _elements(gold), _elements(answer)
    if not (some and others):
        return False
    return any(all(_expressions_differ(one, other) for other in others) for one in some) or any(
        all(_expressions_differ(one, other) for one in some) for other in others
    )


def _elements(one: Any) -> tuple[Any, ...]:
    """Those of a finite set or tuple, the ends of an interval, an expression by itself; none = leave it to others."""
    from sympy import Expr, FiniteSet, Interval, Tuple

    if isinstance(one, Interval):
        return (one.start, one.end)
    if isinstance(one, FiniteSet | Tuple):
        return tuple(one.args) if len(one.args) <= _MOST_ELEMENTS else ()
    return (one,) if isinstance(one, Expr) else ()


def _expressions_differ(one: Any, other: Any) -> bool:
    """Lone symbols are left to others, since names are compared otherwise than values; so are relations in a set."""
    from sympy import Expr, oo

    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return False
    if one in (oo, -oo) or other in (oo, -oo):
        sides = (one, other)
        return one != other and all(side in (oo, -oo) or side.is_number and _is_elementary(side) for side in sides)
    return not (one.is_Symbol or other.is_Symbol) and _differ_somewhere(all, _values_differ, one, other)


def _differ_somewhere(
    of_places: Callable[[Iterable[bool]], bool], differ: Callable[[Any, Any, Values], bool], gold: Any, answer: Any
) -> bool:
    gold, answer = _without_functions(gold), _without_functions(answer)
    if not (_is_elementary(gold) and _is_elementary(answer)):
        return False
    names = gold.free_symbols | answer.free_symbols
    try:
        return of_places(differ(gold, answer, {name: _value(str(name), place) for name in names}) for place in _PLACES)
    except Exception:  # no value here: infinite, undefined, or something sympy trips over
        return False


def _values_differ(gold: Any, answer: Any, values: Values) -> bool:
    return _are_apart(_evaluated(gold, values), _evaluated(answer, values), _LEAST)


def _equations_differ(gold: Any, answer: Any, values: Values) -> bool:
    """Whether one fails where the other holds: at places found along each of its symbols."""
    for holds, fails in ((gold, answer), (answer, gold)):
        for name in sorted(holds.free_symbols, key=str):
            place = _where_it_holds(holds, name, values)
            if place is not None and _are_apart(*_sides(fails, place), _LEAST):
                return True
    return False


def _where_it_holds(equation: Any, name: Any, values: Values) -> Values | None:
    """The values with another for one symbol, found by the secant method; an equation linear in it takes one step."""
    before, now = float(values[name]), float(values[name]) + 0.5
    value_before = _residual(equation, {**values, name: before})
    for _ in range(_STEPS):
        place = {**values, name: now}
        if not _are_apart(*_sides(equation, place), _ROUNDING):
            return place
        value = _residual(equation, place)
        step = value * (now - before) / (value - value_before)
        if not abs(step.imag) <= _ROUNDING * abs(step):
            return None
        before, value_before, now = now, value, now - step.real
    return None


def _residual(equation: Any, values: Values) -> complex:
    left, right = _sides(equation, values)
    return left - right


def _sides(equation: Any, values: Values) -> tuple[complex, complex]:
    return _evaluated(equation.lhs, values), _evaluated(equation.rhs, values)


def _evaluated(expression: Any, values: Values) -> complex:
    return complex(expression.evalf(_DIGITS, subs=values))


def _are_apart(one: complex, other: complex, least: float) -> bool:
    """False for what is not a number."""
    return abs(one - other) > least * max(abs(one), abs(other), 1.0)


@functools.lru_cache(maxsize=1000)
def _value(name: str, place: tuple[int, int]) -> Any:
    from sympy import Rational

    sign, denominator = place
    return Rational(denominator + sign * (1 + zlib.crc32(name.encode()) % 1000), denominator)


def _without_functions(one: Any) -> Any:
    """With a symbol for f(x), if nothing is known of f: equal expressions stay equal."""
    from sympy import Symbol
    from sympy.core.function import AppliedUndef

    calls = [call for call in one.atoms(AppliedUndef) if all(argument.is_Atom for argument in call.args)]
    return one.xreplace({call: Symbol(str(call), real=True) for call in calls}) if calls else one


def _is_elementary(one: Any) -> bool:
    """Whether it is built of numbers, symbols, arithmetic, powers, roots, exponentials, logarithms and trigonometry."""
    from sympy import Eq, preorder_traversal

    sides = one.args if isinstance(one, Eq) else (one,)
    for number, node in enumerate(node for side in sides for node in preorder_traversal(side)):
        if number >= _MOST_NODES or not isinstance(node, _kinds()) or node.is_Pow and _is_out_of_reach(node.exp):
            return False
    return True


def _is_out_of_reach(exponent: Any) -> bool:
    """Whether a number as exponent is too large to compute with, or a power itself: a tower."""
    if not exponent.is_number:
        return False
    parts = exponent.args if exponent.is_Mul else (exponent,)
    return any(abs(part) > _LARGEST_POWER if part.is_Number else not exponent.is_Mul for part in parts)


@functools.cache
def _kinds() -> tuple[type[Any], ...]:
    import sympy

    arithmetic = (sympy.Add, sympy.Mul, sympy.Pow, sympy.Symbol, sympy.Rational, sympy.Float)
    constants = (type(sympy.pi), type(sympy.E), type(sympy.I))
    functions = (sympy.exp, sympy.log, sympy.sin, sympy.cos, sympy.tan, sympy.asin, sympy.acos, sympy.atan, sympy.Abs)
    return (*arithmetic, *constants, *functions)
