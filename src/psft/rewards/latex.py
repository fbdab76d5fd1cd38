"""math-verify's reader of LaTeX, with the same result in less time: most of the time of grading is reading.

    numbers      a text of digits is not given to the grammar; inside an expression, sympy made a number of a text by
                 importing itself into a new name space, every time
    prediction   ANTLR reads in its mode SLL first, which by its documentation gives the tree of mode LL or an error;
                 after an error it reads in mode LL, which works out anew what it cannot keep
    memory       math-verify keeps 20 expressions; samples of one problem repeat their answers

What is remembered is remembered by one process.
"""

from __future__ import annotations

import functools
import re
from typing import Any

MOST_REMEMBERED = 20_000
"""Expressions that a process keeps."""
_PLAIN = re.compile(r"-?\d{1,300}(\.\d{1,300})?")


def quicken() -> None:
    """Let `math_verify.parse` read by `read_latex` in this process. A second call changes nothing."""
    from math_verify import parser

    plain = getattr(parser.parse_latex_cached, "__wrapped__", None)
    if parser.latex2sympy is not read_latex and plain is not None:
        parser.latex2sympy = read_latex
        parser.parse_latex_cached = functools.lru_cache(maxsize=MOST_REMEMBERED)(plain)
        parser.lazy_latex_regex = functools.lru_cache(maxsize=8)(parser.lazy_latex_regex.__wrapped__)


def read_latex(text: str, *, is_real: bool, convert_degrees: bool, normalization_config: None) -> Any:
    """What `latex2sympy2_extended.latex2sympy` makes of a text that is normalised already.

    Raises:
        Exception: the text is no expression to it.
    """
    if (number := _number(text)) is not None:
        return number
    try:
        return _quick_converter()(None, is_real, convert_degrees).parse(text)
    except Exception:  # wrong, or beyond SLL
        from latex2sympy2_extended import latex2sympy

        return latex2sympy(
            text, is_real=is_real, convert_degrees=convert_degrees, normalization_config=normalization_config
        )


@functools.cache
def _quick_converter() -> type[Any]:
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    class Quick(_Latex2Sympy):  # type: ignore[misc]
        def create_parser(self, text: str) -> Any:
            parser = super().create_parser(text)
            parser._interp.predictionMode = PredictionMode.SLL
            return parser

        def parse_number(self, text: str) -> Any:
            number = _number(text.replace(",", ""))
            return super().parse_number(text) if number is None else number

    return Quick


def _number(text: str) -> Any:
    """The sympy number that a text of digits is, None for every other text."""
    from sympy import Float, Integer

    found = _PLAIN.fullmatch(text)
    if found is None:
        return None
    return Float(text) if found.group(1) else Integer(int(text))
