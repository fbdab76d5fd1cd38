"""The prompts that readiness is measured on: those that come with psft, any benchmark, or a file of one's own.

A data file becomes a benchmark of mathematics, its fields found by the names that `psft grpo` looks for
(`psft.data.prompts`); so does a `reasoning-gym:` source whose answers are numbers. All of them are sampled as rollouts
are: temperature 1, the whole vocabulary, as many answers as a group has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from psft.data.files import FILE_SUFFIXES
from psft.data.gym import PREFIX, open_gym_task, parse_gym_source
from psft.data.prompts import GOLD_FIELDS, PROMPT_FIELDS
from psft.errors import RequestError, shown
from psft.evaluation.benchmarks import Benchmark, Sampling, Suite, packaged_suite
from psft.evaluation.chosen import choose
from psft.evaluation.items import read_rows
from psft.evaluation.readiness.settings import READINESS
from psft.evaluation.settings import HowToSample, WhatToEvaluate

MOST_PROMPTS = 64
"""Of a file of one's own, unless --limit says otherwise: a share then has an error of at most 0.06."""
_ROLLOUT = Sampling(temperature=1.0, top_p=1.0)
_GOLDS = (*GOLD_FIELDS, "reward_model.ground_truth")


def readiness_suite(names: Sequence[str]) -> Suite:
    """What stands in `--suite` beside `rl-readiness`; nothing: the prompts that come with psft.

    Benchmarks are renamed `rl-readiness/NAME`: their answers are not drawn as a benchmark's, and must not be read as
    its score.

    Raises:
        RequestError: an unknown name, or a file without questions or answers.
    """
    others = [name for name in names if name != READINESS]
    if not others:
        suite = packaged_suite(READINESS)
        return replace(suite, benchmarks=tuple(map(_renamed, suite.benchmarks)))
    found: list[Benchmark] = []
    labels: list[str] = []
    for name in others:
        suite = _of_source(name) if _is_source(name) else choose([name])
        labels.append(suite.name)
        found += suite.benchmarks
    names_found = [benchmark.name for benchmark in found]
    twice = sorted({name for name in names_found if names_found.count(name) > 1})
    if twice:
        raise RequestError(f"the prompts of {', '.join(twice)} are asked for twice. Name them once.")
    return Suite(f"{READINESS}-{'+'.join(labels)}", tuple(map(_renamed, found)))


def as_rollouts(what: WhatToEvaluate, how: HowToSample, group_size: int) -> tuple[WhatToEvaluate, HowToSample]:
    """The request with RL's sampling where it does not say otherwise."""
    how = replace(
        how,
        temperature=_ROLLOUT.temperature if how.temperature is None else how.temperature,
        top_p=_ROLLOUT.top_p if how.top_p is None else how.top_p,
    )
    return replace(what, k=group_size if what.k is None else what.k), how


def _renamed(benchmark: Benchmark) -> Benchmark:
    return replace(benchmark, name=f"{READINESS}/{benchmark.name}", title=benchmark.shown_name)


def _is_source(name: str) -> bool:
    return name.startswith(PREFIX) or name.lower().endswith((*FILE_SUFFIXES, ".csv.gz", ".json.gz"))


def _of_source(name: str) -> Suite:
    if name.startswith(PREFIX):
        return _of_task(name)
    path = Path(name).expanduser().absolute()
    label = path.name.partition(".")[0]
    first = next(iter(read_rows(path)), None)
    if first is None:
        raise RequestError(f"{shown(name)} holds no row. Give one with at least one prompt.")
    made = _benchmark(label, path.name, _fields(first, name))
    return Suite(label, (replace(made, folder=path.parent, distinct=True, limit=MOST_PROMPTS),))


def _of_task(source: str) -> Suite:
    """Numbers are graded as mathematics, any other answer by the task's own scorer, which may give parts of a point."""
    task, _ = parse_gym_source(source)
    if _is_number(open_gym_task(source)[0]["answer"]):
        return Suite(task, (_benchmark(task, source, {"id": "id", "question": "question", "gold": "answer"}),))
    fields = {name: name for name in ("id", "question", "gym_source", "gym_index")}
    return Suite(task, (Benchmark(task, "reasoning_gym", source, fields=fields, sampling=_ROLLOUT),))


def _is_number(answer: object) -> bool:
    try:
        float(str(answer).replace(",", ""))
    except ValueError:
        return False
    return True


def _benchmark(name: str, file: str, fields: Mapping[str, Any]) -> Benchmark:
    return Benchmark(name, "math", file, fields=fields, sampling=_ROLLOUT, grader={"require_boxed": False})


def _fields(row: Mapping[str, Any], name: str) -> dict[str, str]:
    question = next((field for field in PROMPT_FIELDS if row.get(field)), None)
    gold = next((field for field in _GOLDS if _has(row, field)), None)
    if question is None or gold is None:
        lacking = " and ".join(
            f"{what} ({', '.join(fields)})"
            for what, fields, found in (("a question", PROMPT_FIELDS, question), ("an answer", _GOLDS, gold))
            if found is None
        )
        raise RequestError(
            f"{shown(name)}: its rows have {', '.join(map(str, list(row)[:12]))}, but not {lacking}. Name the fields "
            "in a suite file of your own: docs/evaluation.md."
        )
    return {"question": question, "gold": gold}


def _has(row: Mapping[str, Any], path: str) -> bool:
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value is not None
