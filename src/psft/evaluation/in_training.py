"""Which benchmarks a training run evaluates, and which of them say what its best checkpoint is. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from psft.config import BenchmarkFields
from psft.errors import RequestError, shown
from psft.evaluation.benchmarks import Benchmark, Suite, choose, read_suite
from psft.evaluation.items import Data, find_file, load_data, why_absent

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
    for benchmark in suite.benchmarks:
        found += [f"{benchmark.shown_name}: {problem}" for problem in benchmark.sampling.problems()]
        if benchmark.sampling.temperature == 0 and benchmark.k > 1:
            found.append(
                f"{benchmark.shown_name}: {benchmark.k} greedy samples of an item would be the same. Set {PREFIX}k=1"
            )
    return found


def chosen_suite(settings: BenchmarkFields) -> Suite:
    """The benchmarks of `eval_suite`, with what the other settings say instead of the suite.

    Raises:
        RequestError: an unknown name, two benchmarks of one name, or a file that is no suite.
    """
    suite = _choose(settings.eval_suite or [])
    changes = {"k": settings.eval_suite_k, "limit": settings.eval_suite_limit}
    sampling = {"temperature": settings.eval_suite_temperature, "max_tokens": settings.eval_suite_max_new_tokens}
    return replace(suite, benchmarks=tuple(_changed(benchmark, changes, sampling) for benchmark in suite.benchmarks))


def _choose(names: Sequence[str]) -> Suite:
    own = {name: read_suite(Path(name).expanduser()) for name in names if name.endswith((".yaml", ".yml"))}
    return choose(names, own)


def _changed(benchmark: Benchmark, changes: Mapping[str, Any], sampling: Mapping[str, Any]) -> Benchmark:
    given = {name: value for name, value in sampling.items() if value is not None}
    return replace(
        benchmark,
        sampling=replace(benchmark.sampling, **given),
        **{name: value for name, value in changes.items() if value is not None},
    )


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
    suites = {_choose([name]).name: name for name in settings.eval_suite or []}
    if wanted in suites:
        return Selection(wanted, tuple(benchmark.name for benchmark in _choose([suites[wanted]]).benchmarks))
    known = ", ".join(dict.fromkeys([*suites, *names, MEAN]))
    raise RequestError(f"select_best={shown(wanted, 60)} is nothing that eval_suite evaluates. Use one of {known}.")


def load_benchmarks(settings: BenchmarkFields) -> list[Data]:
    """The data of every benchmark of `eval_suite`.

    Raises:
        RequestError: the data of some are absent (all are named, with how to get them), or not as they should be.
    """
    suite = chosen_suite(settings)
    named = settings.eval_suite_data_dir or os.environ.get("PSFT_DATA_DIR")
    data_dir = Path(named).expanduser() if named else None
    if data_dir is not None and not data_dir.is_dir():
        raise RequestError(f"{PREFIX}data_dir={data_dir} is no folder. Give the one that holds the benchmark files.")
    is_fetching = settings.eval_suite_download
    absent = [
        why_absent(benchmark, data_dir, prefix=f"--{PREFIX}")
        for benchmark in suite.benchmarks
        if find_file(benchmark, data_dir) is None and not (is_fetching and benchmark.hub is not None)
    ]
    if absent:
        raise RequestError("benchmarks of eval_suite are not here:\n" + "\n".join(f"  - {line}" for line in absent))
    return [load_data(benchmark, data_dir, download=is_fetching) for benchmark in suite.benchmarks]
