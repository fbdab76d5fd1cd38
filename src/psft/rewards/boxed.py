r"""Where a response says its answer: `\boxed{...}`, "The answer is: ...", `#### ...`.

A box counts if its braces balance, so that a response cut off inside its last box answers with an earlier one or not at
all. Boxes that only "and", "or" or commas part are one answer of several parts; otherwise the last box is the answer.
"""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_JOINER = re.compile(
    r"[\s$.]*(?:,|;|and|or|\\text\s*\{\s*(?:and|or)\s*\}|\\(?:quad|qquad|,|;))+[\s$]*(?:and|or)?[\s$]*"
)


def boxed_answers(text: str) -> list[str]:
    r"""The contents of every balanced, non-empty `\boxed{...}` (or `\fbox{...}`) outside another, in order.

    >>> boxed_answers(r"First \boxed{41}, no: \boxed{\frac{1}{2}}, and \boxed{cut o")
    ['41', '\\frac{1}{2}']
    """
    return [text[start:end].strip() for _, start, end, _ in _boxes(text)]


def last_box(text: str) -> str | None:
    r"""The last balanced box's content; neighbouring boxes joined by "and", "or" or a comma count as one.

    >>> last_box(r"$\boxed{1}$ and $\boxed{-2}$")
    '1, -2'
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    first = len(boxes) - 1
    while first > 0 and _JOINER.fullmatch(text, boxes[first - 1][3], boxes[first][0]):
        first -= 1
    parts = [_unwrapped(text[start:end].strip()) for _, start, end, _ in boxes[first:]]
    return ", ".join(dict.fromkeys(parts))


def _boxes(text: str) -> list[tuple[int, int, int, int]]:
    """(start of the command, start and end of the content, end of the box) of each."""
    found = []
    position = 0
    while (opening := _BOX.search(text, position)) is not None:
        end = _closing(text, opening.end())
        if end is None:
            position = opening.end()  # cut off: a box inside it may still be whole
            continue
        if text[opening.end() : end].strip():
            found.append((opening.start(), opening.end(), end, end + 1))
        position = end + 1
    return found


def _closing(text: str, start: int) -> int | None:
    """Where the brace that was open before `start` closes; an escaped brace is none."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace.group() == "{":
            depth += 1
        elif brace.group() == "}":
            depth -= 1
            if depth == 0:
                return brace.start()
    return None


def _unwrapped(content: str) -> str:
    """The content without a box that is all of it."""
    while (opening := _BOX.match(content)) is not None and _closing(content, opening.end()) == len(content) - 1:
        content = content[opening.end() : -1].strip()
    return content


def is_box(text: str, content: str | None) -> bool:
    r"""Whether the text says `content` and nothing else, bare or in a box, with dollar signs or `\(...\)` around.

    >>> is_box(r"\(\boxed{5}\)", "5"), is_box("5", "5"), is_box(r"\boxed{5} or 6", "5")
    (True, True, False)
    """
    inside = text.strip(" $.").removeprefix(r"\(").removesuffix(r"\)").strip()
    return content is not None and content in (text, _unwrapped(inside))


_STATED = re.compile(
    r"(?:^[ \t]*####|^[ \t]*A:|(?:\*\*)?(?i:answer)(?:\*\*)?(?i:\s+is)?:?(?<=[:s*])(?:\*\*)?:?)"
    r"[ \t]*(?P<answer>[^\n]*\S)",
    re.MULTILINE,
)
_SENTENCE = re.compile(r"(\$[^$]*\$|\\\(.*?\\\)|\S(?:[^.\n]|\.(?=\d))*)")


def stated_answer(text: str) -> str | None:
    """What follows the last "the answer is", "Answer:", `####` or line beginning "A:", up to the sentence's end."""
    found = [match.group("answer") for match in _STATED.finditer(text)]
    sentence = _SENTENCE.match(found[-1].strip(" *")) if found else None
    return sentence.group(1).strip(" *") if sentence else None
