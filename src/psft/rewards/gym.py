r"""reasoning-gym's own scorers: from 0 to 1, and often something in between for an answer that is nearly right.

A row names its entry by source and number (`psft.data.gym`); the worker makes the entry again, which is exact: metadata
with tuples and numbers as keys would not survive a file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from psft.data.demonstrations import last_number
from psft.data.gym import open_gym_task
from psft.errors import RequestError
from psft.rewards.base import Grade, text_field
from psft.rewards.boxed import last_box, stated_answer


def _tagged(response: str) -> str | None:
    before, opening, rest = response.rpartition("<answer>")
    answer, closing, _ = rest.partition("</answer>")
    return answer.strip() if opening and closing and answer.strip() else None


def _last_line(response: str) -> str | None:
    return response.rstrip().rpartition("\n")[2].strip() or None


_EXTRACTORS: dict[str, tuple[Callable[[str], str | None], ...]] = {
    "auto": (_tagged, last_box, stated_answer),
    "tag": (_tagged,),
    "boxed": (last_box,),
    "last_line": (_last_line,),
    "last_number": (last_number,),
    "whole": (lambda response: response.strip() or None,),
}


class GymGrader:
    r"""Grades `response` to the entry `gym_index` (from 0) of `gym_source`, as `reasoning-gym:chain_sum?size=500`.

    Args:
        extract: what of the response is the answer: tag (`<answer>...</answer>`), boxed (`\boxed{}`), last_line,
            last_number, whole, or auto: tag, else box, else what follows "the answer is". None found: score 0, and
            counted.
    """

    name = "reasoning_gym"
    is_quick = False  # some of its scorers run programs or search

    def __init__(self, extract: str = "auto") -> None:
        if extract not in _EXTRACTORS:
            raise RequestError(f"extract={extract!r} is not known; it is one of {', '.join(_EXTRACTORS)}.")
        self.extract = extract

    def prepare(self) -> None:
        try:
            import reasoning_gym  # noqa: F401
        except ImportError as error:
            raise RequestError("grader reasoning_gym needs reasoning-gym: pip install reasoning-gym.") from error

    def check(self, row: Mapping[str, Any]) -> None:
        text_field(row, "response")
        size = len(open_gym_task(text_field(row, "gym_source")))
        index = row.get("gym_index")
        if type(index) is not int or not 0 <= index < size:
            raise RequestError(f"field 'gym_index' is {index!r}; {row['gym_source']} has entries 0 to {size - 1}.")

    def __call__(self, row: Mapping[str, Any]) -> Grade:
        self.check(row)
        found = (extractor(row["response"]) for extractor in _EXTRACTORS[self.extract])
        answer = next((text for text in found if text is not None), None)
        if answer is None:
            return Grade(0.0, None, "no answer found")
        source, index = row["gym_source"], row["gym_index"]
        score = float(open_gym_task(source).score_answer(answer, _entry(source, index)))
        return Grade(score, answer, "by reasoning-gym's scorer")


@functools.lru_cache(maxsize=4096)
def _entry(source: str, index: int) -> Any:
    return open_gym_task(source)[index]
