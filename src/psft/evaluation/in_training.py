"""Which benchmarks a training run evaluates, and which of them say what its best checkpoint is. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from psft.config import BenchmarkFields
from psft.errors import RequestError, shown
from psft.evaluation.benchmarks import Benchmark, Suite
from psft.evaluation.chosen import adjusted, choose, contradictions
from psft.evaluation.items import Data
from psft.evaluation.local_data import data_folder, load_all, not_here

PREFIX = "eval_suite_"
MEAN = "mean"
_PARTS = tuple(item.name for item in fields(BenchmarkFields) if item.name.startswith(PREFIX))


@dataclass(frozen=True)
class Selection:
    """What the best checkpoint is chosen by: the mean over these benchmarks. name: of the suite, benchmark, or mean."""

    name: str
    benchmarks: tuple[str, ...]

    def score(self, results: Sequence[Mapping[str, Any]]) -> float:
        """Mean accuracy in 0..1 out of the results of one step."""
        found = {result["benchmark"]: result["accuracy"]["value"] for result in results}
        return float(np.mean([found[name] for name in self.benchmarks]))


def cost_in_words(data: Sequence[Data]) -> str:
    """`AIME24, MATH-500: 4,960 samples of at most 10,240 tokens`"""
    samples = sum(len(part.items) * part.benchmark.k for part in data)
    longest = max(part.benchmark.sampling.max_tokens for part in data)
    names = ", ".join(part.benchmark.shown_name for part in data)
    return f"{names}: {samples:,} samples of at most {longest:,} tokens"


def problems_of(settings: BenchmarkFields) -> list[str]:
    """What is wrong with the settings of evaluation while training, in words; looks for no data."""
    if not settings.eval_suite:
        given = [name for name in _PARTS if getattr(settings, name) != getattr(BenchmarkFields, name)]
        given += ["select_best"] if settings.select_best is not None else []
        return [f"{name} has no effect without eval_suite. Name the benchmarks, or remove it" for name in given]
    found = [
        f"{PREFIX}{name}={getattr(settings, PREFIX + name)} must be 1 or more"
        for name in ("steps", "limit", "k", "max_new_tokens", "batch_size")
        if getattr(settings, PREFIX + name) is not None and getattr(settings, PREFIX + name) < 1
    ]
    try:
        suite = chosen_suite(settings)
        selection_of(settings, suite)
    except RequestError as error:
        return [*found, str(error).rstrip(".")]
    return found + contradictions(suite, one_sample=f"{PREFIX}k=1")


def chosen_suite(settings: BenchmarkFields) -> Suite:
    """The benchmarks of `eval_suite`, with what the other settings say instead of the suite.

    Raises:
        RequestError: an unknown name, two benchmarks of one name, or a file that is no suite.
    """
    return adjusted(
        choose(settings.eval_suite or []), k=settings.eval_suite_k, limit=settings.eval_suite_limit,
        temperature=settings.eval_suite_temperature, max_tokens=settings.eval_suite_max_new_tokens,
    )  # fmt: skip


def selection_of(settings: BenchmarkFields, suite: Suite) -> Selection | None:
    """What `select_best` means; None where nothing is chosen.

    Raises:
        RequestError: it names nothing that is evaluated.
    """
    wanted = settings.select_best
    if wanted is None:
        return None
    names = [benchmark.name for benchmark in suite.benchmarks]
    if wanted == MEAN:
        return Selection(MEAN, tuple(names))
    if wanted in names:
        return Selection(wanted, (wanted,))
    suites = {choose([name]).name: name for name in settings.eval_suite or []}
    if wanted in suites:
        return Selection(wanted, tuple(benchmark.name for benchmark in choose([suites[wanted]]).benchmarks))
    known = ", ".join(dict.fromkeys([*suites, *names, MEAN]))
    raise RequestError(f"select_best={shown(wanted, 60)} is nothing that eval_suite evaluates. Use one of {known}.")


def fetched_benchmarks(settings: BenchmarkFields) -> list[Benchmark]:
    """Those of `eval_suite` that are not on this machine, if a run fetches them all, as `eval_suite_download` asks for.

    Raises:
        RequestError: `eval_suite_data_dir` is no folder.
    """
    absent = not_here(chosen_suite(settings), _data_dir(settings))
    return absent if settings.eval_suite_download and all(b.hub is not None for b in absent) else []


def _data_dir(settings: BenchmarkFields) -> Path | None:
    return data_folder(settings.eval_suite_data_dir, setting=f"{PREFIX}data_dir=")


def load_benchmarks(settings: BenchmarkFields) -> list[Data]:
    """The data of every benchmark of `eval_suite`.

    Raises:
        RequestError: the data of some are absent (all are named, with how to get them), or not as they should be.
    """
    return load_all(
        chosen_suite(settings), _data_dir(settings), download=settings.eval_suite_download, prefix=f"--{PREFIX}",
        title="benchmarks of eval_suite are not here",
    )  # fmt: skip
