"""Multiple choice: options shuffled with a seed, and the letter a response ends in, by an ordered list of extractors.

Sources of the forms: the prompts and regular expressions of MMLU-Pro ("The answer is (X)"), SuperGPQA ("Answer: X"),
simple-evals ("ANSWER: X") and of boxed answers. MMLU-Pro's own script answers with a random letter where it finds none;
here that is None, which is counted.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from psft.errors import RequestError
from psft.rewards.base import Grade, text_field
from psft.rewards.boxed import boxed_answers

LETTERS = string.ascii_uppercase
MOST_OPTIONS = len(LETTERS)


def shuffle_options(options: Sequence[str], gold_index: int, seed: int, item_id: str) -> tuple[list[str], str]:
    """The options in an order drawn for this item, and the letter the right one has there.

    The same seed and item always give the same order, whatever else is drawn; another item another.

    Args:
        options: 2 to 26 texts. gold_index: which is right, from 0. item_id: tells the item from others of its set.
    Raises:
        RequestError: too few or too many options, or no option of that index.
    """
    if not 2 <= len(options) <= MOST_OPTIONS:
        raise RequestError(f"item {item_id!r} has {len(options)} options; give 2 to {MOST_OPTIONS}.")
    if not 0 <= gold_index < len(options):
        raise RequestError(f"item {item_id!r}: the right option is number {gold_index} of {len(options)}, from 0.")
    order = list(range(len(options)))
    random.Random(f"{seed}:{item_id}").shuffle(order)  # seeded by text: Python hashes it by SHA-512, on every machine
    return [options[i] for i in order], LETTERS[order.index(gold_index)]


class ChoiceGrader:
    """Grades `response` against the letter `gold`. `options` (texts, in the order of their letters) is optional: with
    it letters beyond the last option are no answers, and a response that gives an option's text is understood.

    Without `options` the letters A to J count. A lower-case or bracketed gold, as "(b)", is understood.
    """

    name = "choice"
    is_quick = True

    def prepare(self) -> None:
        """Nothing to load."""

    def check(self, row: Mapping[str, Any]) -> None:
        text_field(row, "response")
        self._letters(row)

    def __call__(self, row: Mapping[str, Any]) -> Grade:
        response = text_field(row, "response")
        gold, letters, options = self._letters(row)
        letter, how = extract_letter(response, letters=letters, options=options)
        if letter is None:
            return Grade(0.0, None, "no answer found")
        return Grade(
            float(letter == gold), letter, f"{'right' if letter == gold else f'gold is {gold}'}; found by {how}"
        )

    def _letters(self, row: Mapping[str, Any]) -> tuple[str, str, list[str] | None]:
        """The gold letter, every letter that is an option, and the options' texts if they are given."""
        options = row.get("options")
        if options is not None:
            if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
                raise RequestError("field 'options' is not a list of texts. Give the options' texts, or leave it out.")
            if not 2 <= len(options) <= MOST_OPTIONS:
                raise RequestError(f"field 'options' has {len(options)} entries; give 2 to {MOST_OPTIONS}.")
        letters = LETTERS[: len(options) if options is not None else 10]
        gold = text_field(row, "gold").strip().strip("().").upper()
        if len(gold) != 1 or gold not in letters:
            raise RequestError(f"field 'gold' is {row['gold']!r}; the options are {letters[0]} to {letters[-1]}.")
        return gold, letters, options


def extract_letter(
    response: str, *, letters: str = LETTERS[:10], options: Sequence[str] | None = None
) -> tuple[str | None, str]:
    """The letter a response answers with and the extractor that found it, in words; (None, "") if none did.

    Extractors in order: a box that holds one letter; "answer is (X)"; "Answer: X"; a letter standing alone; the text of
    exactly one option, in the box, after "answer is" or as the last line. Each takes its last match.

    Args:
        letters: those that are options, in upper case; no other is ever returned.
        options: their texts, in the same order, if they are known.
    """
    extractors = (
        ("the box", _boxed_letter(response, letters)),
        ("'answer is'", _last_stated(r"answer\s+is:?", response, letters)),
        ("'answer:'", _last_stated(r"answer\s*:", response, letters)),
        ("a letter alone", _last_alone(response, letters)),
        ("the option's text", _option_text(response, letters, options)),
    )
    return next(((letter, how) for how, letter in extractors if letter is not None), (None, ""))


_WRAPPING = r"(?:\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{|[\s*_$\"'(\[{]|\\[(\[])*"
"""What may stand before a letter: spaces, marks of emphasis, brackets, LaTeX that sets text."""
_NO_LETTER = r"(?![\w'’-])(?!\s+(?!(?:because|since|as|and|which|with|for|is|or)\b)[a-z])"
"""What may not follow a bare A or I: the article and the pronoun, as in "answer is a number", "I think"."""


def _boxed_letter(response: str, letters: str) -> str | None:
    boxes = boxed_answers(response)
    if not boxes:
        return None
    found = re.fullmatch(rf"{_WRAPPING}([{letters}{letters.lower()}])(?![\w'’]).{{0,300}}", boxes[-1], re.DOTALL)
    if found is None or re.match(_NO_LETTER, boxes[-1][found.end(1) :]) is None and found.group(1) in "aAiI":
        return None
    return found.group(1).upper()


def _last_stated(words: str, response: str, letters: str) -> str | None:
    """After the words: an upper-case letter, or one of any case in brackets."""
    bare = "".join(letter for letter in letters if letter not in "AI")
    risky = "".join(letter for letter in letters if letter in "AI") or "A"
    pattern = (
        rf"(?i:{words}){_WRAPPING}(?:"
        rf"(?<=[(\[{{])([{letters}{letters.lower()}])(?=[\s*_$}}]*[)\]}}])|([{bare}])(?![\w'’-])|([{risky}]){_NO_LETTER})"
    )
    found = [next(filter(None, groups)) for groups in re.findall(pattern, response)]
    return found[-1].upper() if found and found[-1].upper() in letters else None


def _last_alone(response: str, letters: str) -> str | None:
    """An upper-case letter that is the last line, or begins it as an option does ("B) Paris"), or ends it: in brackets,
    or after a word such as "choose". No letter elsewhere counts: the names in formulas are letters, too.
    """
    line = _last_line(response)
    begins = re.match(rf"{_WRAPPING}([{letters}])(?:[\s*_$}}]*[)\].:]|[\s*_$}}]*$)", line)
    ends = re.search(
        rf"(?:[(\[{{][\s*_$]*|\b(?i:is|choose|option|answer|select|letter|pick|choice)[\s*_$:]+)([{letters}])[\s*_$}})\].!]*$",
        line[-80:],
    )
    found = begins or ends
    return found.group(1) if found else None


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2].strip()


def _option_text(response: str, letters: str, options: Sequence[str] | None) -> str | None:
    """The letter of the one option whose text is given where an answer is given."""
    if not options:
        return None
    stated = re.findall(r"(?i:answer\s+is|answer\s*):?\s*(.+)", response)
    for place in (boxed_answers(response)[-1:], stated[-1:], [_last_line(response)]):
        for text in place:
            same = [i for i, option in enumerate(options) if _plain(option) == _plain(text)]
            if len(same) == 1:
                return letters[same[0]]
    return None


def _plain(text: str) -> str:
    """Text for comparison: no case, no marks at its ends, no LaTeX that only sets it, single spaces."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(text.split()).strip(" .*_$\"'").casefold()
