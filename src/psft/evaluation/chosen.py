"""Which benchmarks are asked for, by name or file, and what a request changes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from psft.errors import RequestError, shown
from psft.evaluation.benchmarks import (
    Benchmark,
    Suite,
    did_you_mean,
    packaged_suite,
    read_suite,
    registered_benchmark,
    registered_names,
    suite_names,
)


def choose(names: Sequence[str]) -> Suite:
    """Benchmarks of several suites, or single ones, as one suite.

    Args:
        names: of suites that come with psft, of benchmarks (`aime24`, `math/aime24`), or YAML files of one's own.
    Raises:
        RequestError: an unknown name, a file that is no suite, or two benchmarks of one name.
    """
    found = [_find(name) for name in names]
    benchmarks = tuple(benchmark for suite in found for benchmark in suite.benchmarks)
    all_names = [benchmark.name for benchmark in benchmarks]
    twice = sorted({name for name in all_names if all_names.count(name) > 1})
    if twice:
        raise RequestError(f"benchmark {', '.join(twice)} is asked for twice. Name it once.")
    return Suite("+".join(suite.name for suite in found), benchmarks)


def _find(name: str) -> Suite:
    if name.endswith((".yaml", ".yml")):
        return read_suite(Path(name).expanduser())
    if name in suite_names():
        return packaged_suite(name)
    single = registered_benchmark(name)
    if single is None:
        raise RequestError(
            f"no suite, benchmark or file named {shown(name)}."
            f"{did_you_mean(name, [*suite_names(), *(known.rpartition('/')[2] for known in registered_names())])} "
            f"Suites: {', '.join(suite_names())}, or a YAML file of your own."
        )
    return Suite(name.replace("/", "-"), (single,))


def adjusted(suite: Suite, *, k: int | None = None, limit: int | None = None, **sampling: Any) -> Suite:
    """The suite with what a request says instead; None = as the suite has it. sampling: fields of `Sampling`."""
    changes: dict[str, Any] = {name: value for name, value in {"k": k, "limit": limit}.items() if value is not None}
    given = {name: value for name, value in sampling.items() if value is not None}
    made = (
        replace(benchmark, sampling=replace(benchmark.sampling, **given), **changes) for benchmark in suite.benchmarks
    )
    return replace(suite, benchmarks=tuple(made))


def contradictions(suite: Suite, *, one_sample: str) -> list[str]:
    """What is wrong with the benchmarks after `adjusted`, in words, each once. one_sample: what sets k to 1."""
    found = [problem for benchmark in suite.benchmarks for problem in _contradictions(benchmark, one_sample)]
    return list(dict.fromkeys(found))


def _contradictions(benchmark: Benchmark, one_sample: str) -> list[str]:
    found = benchmark.sampling.problems()
    if benchmark.sampling.temperature == 0 and benchmark.k > 1:
        found.append(
            f"{benchmark.shown_name}: {benchmark.k} greedy samples of an item would be the same; set {one_sample}"
        )
    return found
