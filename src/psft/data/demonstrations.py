"""Bundled demonstrations: worked grade-school solutions made by reasoning-gym's `gsm_symbolic`, without a download.

`reasoning-gym:gsm_symbolic?size=256&seed=0` gives 256 conversations. Each answer is the worked solution and ends with
a line `#### NUMBER`, as GSM8K's do, so that a greedy answer can be graded with `final_answer`.
`reasoning-gym-pairs:gsm_symbolic?size=64&seed=0` gives pairs of a right and a wrong answer of the same make.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from urllib.parse import parse_qsl

from psft.data.gym import PREFIX
from psft.data.rows import Row
from psft.errors import RequestError

PAIRS_PREFIX = "reasoning-gym-pairs:"
_TASK = "gsm_symbolic"
_DEFAULTS = {"size": 256, "seed": 0}
_FINAL_LINE = re.compile(r"####[ \t]*([^\n]+)")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


def final_answer(text: str) -> str | None:
    """The number after the last `####`, in one spelling: no thousands commas, no unit, no `.0`. None if there is none.

    >>> final_answer("She has 2 * 600 = 1200.\\n#### $1,200.00")
    '1200'
    """
    lines = _FINAL_LINE.findall(text)
    if not lines or (number := _NUMBER.search(lines[-1])) is None:
        return None
    return _plain_number(number.group())


def last_number(text: str) -> str | None:
    """The last number of a text, spelt as `final_answer` spells it. None if there is none.

    >>> last_number("4 + 8 = 12 clips, so the answer is 12.")
    '12'
    """
    numbers = _NUMBER.findall(text)
    return _plain_number(numbers[-1]) if numbers else None


def _plain_number(text: str) -> str:
    text = text.replace(",", "").lstrip("+")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    digits = digits.lstrip("0") or "0"
    digits = f"0{digits}" if digits.startswith(".") else digits
    return digits if digits == "0" else sign + digits


def read_demonstrations(source: str) -> Iterator[Row]:
    """Rows `{"messages": [user, assistant]}` of a `reasoning-gym:` source; the same source always gives the same rows.

    Raises:
        RequestError: unknown task or option, a size or seed that is no count, or reasoning-gym is not installed.
    """
    task, _, query = source.removeprefix(PREFIX).partition("?")
    if task != _TASK:
        raise RequestError(f"{source}: unknown task {task!r}. There is {PREFIX}{_TASK}?size=256&seed=0.")
    options = dict(_DEFAULTS)
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in options or not value.isdecimal():
            raise RequestError(f"{source}: cannot use {key}={value}. Options: size and seed, each a whole number.")
        options[key] = int(value)
    if options["size"] < 1:
        raise RequestError(f"{source}: size must be 1 or more.")
    try:
        import reasoning_gym
    except ImportError as error:
        raise RequestError(f"{source} needs reasoning-gym: pip install reasoning-gym.") from error
    entries = reasoning_gym.create_dataset(_TASK, **options)
    return (_demonstration(source, number, entry) for number, entry in enumerate(entries, start=1))


def read_pairs(source: str) -> Iterator[Row]:
    """Rows `{"prompt", "chosen", "rejected"}` of a `reasoning-gym-pairs:` source, for preference optimisation.

    chosen is the worked solution; rejected is that of the next problem, as fluent and beside the point.

    Raises:
        RequestError: as `read_demonstrations`; or fewer than two problems.
    """
    rows = list(read_demonstrations(PREFIX + source.removeprefix(PAIRS_PREFIX)))
    if len(rows) < 2:
        raise RequestError(f"{source}: a pair takes the solutions of two problems. Give size=2 or more.")
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        (question, answer), (_, beside) = row.value["messages"], other.value["messages"]
        pair = {"prompt": question["content"], "chosen": answer["content"], "rejected": beside["content"]}
        yield Row(source, row.line, pair)


def demonstrations_version(source: str) -> str:
    """What the rows of a `reasoning-gym:` source follow from: its own text, and who draws the random numbers."""
    try:
        version = importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return f"{source}, reasoning-gym {version}, Python {platform.python_version()}"


def _demonstration(source: str, number: int, entry: dict) -> Row:
    solution = _FINAL_LINE.sub("", entry["metadata"]["answer_cot"]).strip()
    answer = f"{solution}\n#### {_plain_number(str(entry['answer']))}"
    messages = [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": answer}]
    return Row(source, number, {"messages": messages})
