"""Tasks of reasoning-gym as prompts: `reasoning-gym:chain_sum?size=500&seed=1&max_terms=3`.

What stands after `?` is the task's own configuration, `size` and `seed` among it. The same source always gives the same
entries, so an entry is named by its source and its number; nothing of it has to be stored.
"""

from __future__ import annotations

import difflib
import functools
import json
from typing import Any
from urllib.parse import parse_qsl

from psft.errors import RequestError, first_line, shown

PREFIX = "reasoning-gym:"
_DEFAULTS: dict[str, Any] = {"size": 500, "seed": 0}


def parse_gym_source(source: str) -> tuple[str, dict[str, Any]]:
    """The task of a `reasoning-gym:` source and its configuration.

    >>> parse_gym_source("reasoning-gym:chain_sum?size=8&allow_negation=true")
    ('chain_sum', {'size': 8, 'seed': 0, 'allow_negation': True})

    Raises:
        RequestError: a size or seed that is no count.
    """
    task, _, query = source.removeprefix(PREFIX).partition("?")
    options = dict(_DEFAULTS)
    for key, text in parse_qsl(query, keep_blank_values=True):
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    for key in _DEFAULTS:
        if type(options[key]) is not int or options[key] < (1 if key == "size" else 0):
            raise RequestError(f"{shown(source)}: {key}={shown(options[key], 40)} must be a whole number.")
    return task, options


@functools.lru_cache(maxsize=16)
def open_gym_task(source: str) -> Any:
    """The task's data set: a sequence of {"question", "answer", "metadata"} that also scores (`score_answer`).

    Raises:
        RequestError: reasoning-gym is not installed, there is no such task, or its configuration is refused.
    """
    task, options = parse_gym_source(source)
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise RequestError(f"{shown(source)} needs reasoning-gym: pip install reasoning-gym.") from error
    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=1, cutoff=0.5)
        advice = f"Did you mean {close[0]}?" if close else "reasoning_gym.factory.DATASETS lists them."
        raise RequestError(f"{shown(source)}: reasoning-gym has no task {shown(repr(task), 60)}. {advice}")
    try:
        return reasoning_gym.create_dataset(task, **options)
    except (TypeError, ValueError, AssertionError) as error:  # a field its configuration lacks, or a value it refuses
        raise RequestError(
            f"{shown(source)}: reasoning-gym refuses this configuration: {shown(first_line(error))}. Correct it."
        ) from error
