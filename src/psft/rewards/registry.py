"""Find a grader by name, or one of your own by import path. A module is imported when its grader is asked for.

The graders here import no torch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

from psft.errors import RequestError, first_line
from psft.rewards.base import Grader

_REGISTERED = {
    "math": "psft.rewards.mathematics:MathGrader",
    "choice": "psft.rewards.choice:ChoiceGrader",
    "ifeval": "psft.rewards.instructions:InstructionGrader",
    "reasoning_gym": "psft.rewards.gym:GymGrader",
}
"""Name -> module:class. The class's constructor takes the grader's settings as keywords."""

_REWARDS = {
    "format": "psft.rewards.shaping:FormatReward",
    "length": "psft.rewards.shaping:LengthReward",
    "overlong": "psft.rewards.shaping:OverlongPunishment",
    "function": "psft.rewards.function:FunctionReward",
}
"""What reinforcement learning rewards besides right answers. Found by name like a grader; none grades an answer."""


def grader_names() -> list[str]:
    return list(_REGISTERED)


def reward_names() -> list[str]:
    """What a reward may be called: the graders, and what only reinforcement learning uses."""
    return [*_REGISTERED, *(name for name in _REWARDS if name != "function")]


def get_grader(name: str, **settings: Any) -> Grader:
    """The grader called `name`.

    Args:
        name: math, choice, ifeval, reasoning_gym; or "module:Class" for one of your own, which has what `Grader` says.
        settings: of that grader; each has a default. math: policy, require_boxed, relative_tolerance. ifeval: is_loose,
            nltk_data. reasoning_gym: extract.
            The names of `reward_names` are found, too.
    Raises:
        RequestError: no such grader or setting (with the nearest), or a wrong value.
    """
    grader = _imported({**_REWARDS, **_REGISTERED}.get(name, name))
    known = list(inspect.signature(grader).parameters)
    for setting in settings:
        if setting not in known:
            raise RequestError(f"grader '{name}' has no setting {setting!r}. {_nearest(setting, known)}")
    return cast(Grader, grader(**settings))


def _imported(path: str) -> Callable[..., Any]:
    module, colon, attribute = path.partition(":")
    if not colon:
        raise RequestError(f"unknown grader {path!r}. {_nearest(path, grader_names())}")
    try:
        return cast(Callable[..., Any], getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(f"grader {path!r} cannot be imported: {first_line(error)}. Check module:Class.") from error


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]}?"
    return f"It has {', '.join(known)}." if known else "It has none."
