r"""One spelling for answers: golds and extracted answers in, the same mathematics in plain LaTeX out.

Covers every notation of the six mathematics sets (AIME24, AIME25, AMC23, MATH-500, Minerva, OlympiadBench): numbers as
JSON numbers, dollar signs around or inside, thousands separators (`10,\!080`, `10{,}080`, `1\,000`), `\dfrac`,
`\frac43`, `\left(`, degrees, money, percent, trailing units, unicode, Python (`np.arcsin`, `-1./3`). What is spelt is
not judged here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from psft.errors import RequestError

_UNICODE = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "﹣": "-", "－": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "÷": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "±": r"\pm ", "°": r"^\circ ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    "ω": r"\omega ", "⁰": "^0", "¹": "^1", "²": "^2", "³": "^3", "⁴": "^4", "⁵": "^5", "⁶": "^6", "⁷": "^7", "⁸": "^8",
    "⁹": "^9", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "√": r"\sqrt ", "％": "%", "，": ",", "（": "(", "）": ")",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
}  # fmt: skip
_TO_ASCII = str.maketrans(_UNICODE)

_COMMANDS: list[tuple[str, str]] = [
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*", ""),
    (r"\\(?:displaystyle|textstyle|limits)(?![A-Za-z])\s*", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:mbox|textbf|textrm|textit|textsf|mathrm|mathbf|mathit|mathsf|rm|hbox)\s*(?=\{)", r"\\text"),
    (r"\\geqs?l?a?n?t?(?![A-Za-z])", r"\\ge"),
    (r"\\leqs?l?a?n?t?(?![A-Za-z])", r"\\le"),
    (r"\\neq(?![A-Za-z])", r"\\ne"),
    (r"\\[lr]brace(?![A-Za-z])", lambda m: r"\{" if "l" in m.group() else r"\}"),  # type: ignore[list-item]
    (r"(?:\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\degrees?(?![A-Za-z]))", r"^\\circ "),
    (r"\bnp\.|\bmath\.", ""),
    (r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sqrt|exp|log|ln|sin|cos|tan|pi)(?![A-Za-z])", r"\\\1"),
]
_SPELLINGS = [(re.compile(pattern), by) for pattern, by in _COMMANDS]
_SPACES = re.compile(r"(?<!\\)\\(?:[,;:!> ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|hspace\*?\{[^{}]*\})|~")
_BARE_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORD_JOINER = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*")


def gold_texts(gold: Any) -> list[str]:
    """The gold answers of a row as texts: any of them is right. A number becomes its shortest spelling.

    Raises:
        RequestError: it is neither text nor a finite number nor a list of those, or it is empty.
    """
    golds = gold if isinstance(gold, list) else [gold]
    texts = [_gold_text(one) for one in golds]
    if not texts or not all(texts):
        raise RequestError("field 'gold' is empty. Give the right answer as text, a number or a list of those.")
    return texts


def _gold_text(gold: Any) -> str:
    if isinstance(gold, str):
        return gold.strip()
    if (
        isinstance(gold, bool)
        or not isinstance(gold, int | float)
        or gold != gold
        or gold in (float("inf"), -float("inf"))
    ):
        raise RequestError(f"field 'gold' holds {gold!r}; give the right answer as text, a number or a list of those.")
    return str(int(gold)) if gold == int(gold) and abs(gold) < 1e15 else repr(gold)


def spelt(text: str) -> str:
    r"""The answer in one spelling, without dollar signs, spacing commands and a full stop at the end.

    >>> spelt(r"$\left(\dfrac43,\ −10,\!080\right)$.")
    '(\\frac{4}{3}, -10080)'
    """
    text = text.translate(_TO_ASCII).replace("\n", " ")
    text = re.sub(r"\\[()\[\]](?![A-Za-z])", " ", text) if re.match(r"\s*\\[(\[]", text) else text
    text = re.sub(r"\\\$", "\0", text).replace("$", "").replace("\0", r"\$")
    text = re.sub(r"(?<=\d)(?:,\\!\s*|\{,\}\s*|\\,|~)(?=\d{3}(?!\d))", "", text)
    text = _SPACES.sub(" ", text)
    for pattern, by in _SPELLINGS:
        text = pattern.sub(by, text)
    text = _BARE_FRACTION.sub(_full_fraction, text)
    text = " ".join(text.split())
    while text and text[-1] in ".,;:" and not text.endswith("\\,"):
        text = text[:-1].rstrip()
    return text


def _full_fraction(found: re.Match[str]) -> str:
    above, below = found.group(1) or found.group(2) or "", found.group(3) or found.group(4) or ""
    return rf"\frac{{{above.strip()}}}{{{below.strip()}}}"


def without_thousands(text: str) -> str:
    """The text without its thousands commas, if all of it is one number that has them.

    >>> without_thousands("58,500"), without_thousands("2500,7500")
    ('58500', '2500,7500')
    """
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def joined_by_commas(text: str) -> str:
    r"""A list whose parts "and" or "or" join, with commas instead.

    >>> joined_by_commas(r"x = 1 \text{ or } x = 2")
    'x = 1, x = 2'
    """
    return _WORD_JOINER.sub(", ", text)


_UNITS = {
    "deg": "degree degrees deg \\circ ^\\circ", "rad": "radian radians rad", "$": "dollar dollars usd \\$",
    "cent": "cent cents ¢", "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres", "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres", "in": "inch inches", "ft": "ft foot feet",
    "yd": "yard yards", "mi": "mile miles", "s": "s second seconds sec", "min": "minute minutes min",
    "h": "hour hours hr hrs", "day": "day days", "week": "week weeks", "month": "month months",
    "year": "year years", "g": "g gram grams", "kg": "kg kilogram kilograms", "lb": "pound pounds lb lbs",
    "oz": "ounce ounces oz",
    "l": "liter liters litre litres", "ml": "ml milliliter milliliters", "mph": "mph",
    "unit": "unit units", "square": "square sq", "cubic": "cubic cu", "per": "per",
}  # fmt: skip
_KNOWN_UNITS = {word: unit for unit, words in _UNITS.items() for word in words.split()}
_UNIT_WORDS = "|".join(
    sorted((re.escape(word) for word in _KNOWN_UNITS if word.isalpha() and len(word) > 1), key=len, reverse=True)
)
_POWER = r"(?:\s*\^\s*(?:\{?\s*-?\d\s*\}?))?"
_TRAILING_UNIT = re.compile(
    rf"(?P<rest>.*[\d}})!%])\s*(?P<unit>(?:\\text\s*\{{[^{{}}]*\}}{_POWER}[\s./]*)+|\^\\circ\s*(?:[CFK]|\\text\s*\{{[^{{}}]*\}})?"
    rf"|(?:(?:(?<=[\d}})]) ?(?:{_UNIT_WORDS})|(?<=[\d}})] )[A-Za-z]{{4,}}){_POWER}(?![A-Za-z])[\s./]*)+)"
)


@dataclass(frozen=True)
class Measured:
    """An answer without its unit.

    unit: the kind of unit if it is a known one ("cm", "$"), "" if not. is_percent: it ended in a percent sign.
    """

    text: str
    unit: str = ""
    is_percent: bool = False


def without_unit(text: str) -> Measured:
    r"""Take a percent sign, money sign, degree sign or trailing unit off an answer that goes on without it.

    >>> without_unit(r"864 \text{ inches}^2"), without_unit(r"62.5\%")
    (Measured(text='864', unit='in', is_percent=False), Measured(text='62.5', unit='', is_percent=True))
    """
    unit = ""
    money = re.fullmatch(r"(-?)\s*(?:\\\$|[€£])\s*(.*\d.*)", text)
    if money is not None:
        text, unit = money.group(1) + money.group(2), "$" if r"\$" in text else ""
    percent = re.fullmatch(r"(.*[^\s\\])\s*(?:\\?%|\\text\s*\{\s*(?:\\?%|percent)\s*\}|(?<=[\d}\s])percent)", text)
    if percent is not None:
        return Measured(percent.group(1), unit, True)
    if (found := _TRAILING_UNIT.fullmatch(text)) is not None:
        words = re.findall(r"\\circ|[A-Za-z]+|¢", re.sub(r"\\text", " ", found.group("unit")))
        known = [_KNOWN_UNITS[word.lower()] for word in words if word.lower() in _KNOWN_UNITS]
        return Measured(found.group("rest"), unit or next((k for k in known if k not in ("square", "cubic")), ""))
    return Measured(text, unit)


def words_of(text: str) -> str | None:
    r"""The words of an answer that is text, as `\text{east}` or `(B)`, lower case, single spaces; None if it is none.

    >>> words_of(r"\text{Evelyn}"), words_of("(C)"), words_of(r"\text{(C)}"), words_of("x + y")
    ('evelyn', 'c', 'c', None)
    """
    plain = _TEXT.sub(r" \1 ", text)
    plain = " ".join(plain.split()).strip(" .'\"")
    if re.fullmatch(r"\(?[A-Z]\)?", plain):
        return plain.strip("()").lower()
    is_set_as_text = _TEXT.fullmatch(text.strip()) is not None
    if re.fullmatch(r"\(?[A-Za-z][A-Za-z' -]*\)?", plain) and (is_set_as_text or re.search(r"[A-Za-z]{3}", plain)):
        return plain.strip("()").lower()
    return None
