"""Find a grader by name. A grader's module is imported when the grader is asked for, never torch."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any, cast

from psft.errors import RequestError
from psft.rewards.base import Grader

_REGISTERED = {
    "math": "psft.rewards.mathematics:MathGrader",
    "choice": "psft.rewards.choice:ChoiceGrader",
    "ifeval": "psft.rewards.instructions:InstructionGrader",
}
"""Name -> module:class. The class's constructor takes the grader's settings as keywords."""


def grader_names() -> list[str]:
    return list(_REGISTERED)


def get_grader(name: str, **settings: Any) -> Grader:
    """The grader called `name`.

    Args:
        name: math, choice or ifeval.
        settings: of that grader; each has a default. math: policy, require_boxed, relative_tolerance. ifeval: is_loose,
            nltk_data.
    Raises:
        RequestError: no such grader or setting (with the nearest), or a wrong value.
    """
    if name not in _REGISTERED:
        raise RequestError(f"unknown grader {name!r}. {_nearest(name, grader_names())}")
    module, _, attribute = _REGISTERED[name].partition(":")
    grader = getattr(importlib.import_module(module), attribute)
    known = list(inspect.signature(grader).parameters)
    for setting in settings:
        if setting not in known:
            raise RequestError(f"grader '{name}' has no setting {setting!r}. {_nearest(setting, known)}")
    return cast(Grader, grader(**settings))


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]}?"
    return f"It has {', '.join(known)}." if known else "It has none."
