r"""Answers of several parts: lists, sets, tuples, intervals, unions, `\pm`; each part is compared on its own.

1, 2     1 \text{ and } 2     \{1, 2\}     3 \pm 1        in any order
(1, 2)   [0, 1)   (1, 2, 3)                               in this order, brackets of the same kind
(0, 9) \cup (9, 36)                                       in any order
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from psft.rewards.notation import joined_by_commas, without_thousands

_PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Parts:
    """kind: "list" (bare), "set" (braces), "union", or the brackets of a tuple or interval, as "(]"."""

    kind: str
    items: tuple[str, ...]

    @property
    def is_ordered(self) -> bool:
        return self.kind not in ("list", "set", "union")


def parts_of(text: str) -> Parts | None:
    """The parts of an answer as `notation.spelt` writes it; None if it has but one."""
    union = split_top(text, [r"\cup"])
    if len(union) > 1:
        return Parts("union", tuple(union))
    if (inside := _inside(text)) is not None:
        opening, content, closing = inside
        if opening == r"\{":
            return Parts("set", tuple(_expanded(split_top(content, [",", ";"]))))
        items = split_top(content, [",", ";"])
        return Parts(opening + closing, tuple(items)) if len(items) > 1 else None
    items = _bare_items(joined_by_commas(text))
    items = _expanded(items)
    return Parts("list", tuple(items)) if len(items) > 1 else None


def split_top(text: str, separators: list[str]) -> list[str]:
    """Cut where a separator stands outside all brackets; empty pieces are left out."""
    pieces = []
    depth = start = position = 0
    while position < len(text):
        two = text[position : position + 2]
        if two in (r"\{", r"\}"):
            depth += 1 if two == r"\{" else -1
            position += 2
            continue
        letter = text[position]
        depth += (letter in "([{") - (letter in ")]}")
        found = next((s for s in separators if text.startswith(s, position)), None) if depth == 0 else None
        if found is not None and not (found[-1].isalpha() and text[position + len(found) :][:1].isalpha()):
            pieces.append(text[start:position])
            position += len(found)
            start = position
        else:
            position += 1
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces if piece.strip()]


def _inside(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, content and closing bracket, if one pair holds all of the text. `(0, 1]` is a pair, too."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return (r"\{", text[2:-2], r"\}") if _closes_at_end(text[2:-2]) else None
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and _closes_at_end(text[1:-1]):
        return text[0], text[1:-1], text[-1]
    return None


def _closes_at_end(content: str) -> bool:
    """Whether no bracket closes in the content that opened before it."""
    depth = 0
    for bracket in re.findall(r"\\[{}]|[()\[\]{}]", content):
        depth += 1 if bracket[-1] in "([{" else -1
        if depth < 0:
            return False
    return depth == 0


def _bare_items(text: str) -> list[str]:
    """Commas before a space part items; one without may be a thousands comma of a number: `2,400, 1,350` is two."""
    items = []
    for item in split_top(text, [", ", ";"]):
        plain = without_thousands(item)
        items += [plain] if plain != item else split_top(item, [","])
    return items


def _expanded(items: list[str]) -> list[str]:
    r"""Each `a \pm b` as the two it stands for."""
    expanded: list[str] = []
    for item in items:
        if len(re.findall(r"\\pm(?![A-Za-z])", item)) == 1 and not re.search(r"\\mp(?![A-Za-z])", item):
            before, after = re.split(r"\\pm(?![A-Za-z])", item)
            expanded += [
                f"{before.strip()} + {after.strip()}".removeprefix("+ ").strip(),
                f"{before.strip()} - {after.strip()}",
            ]
        else:
            expanded.append(item)
    return expanded
