"""Has a backend make the samples that are missing, and keeps each as it comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from psft.evaluation.backends import Backend, Failure, Request
from psft.evaluation.items import Data
from psft.evaluation.progress import Progress
from psft.evaluation.samples import KeyedFile, SampleRow, sample_key, seed_of


@dataclass(frozen=True)
class Plan:
    """The samples of one benchmark: one request each, items in order, the k of an item together."""

    data: Data
    requests: tuple[Request, ...]
    rows: Mapping[str, SampleRow]
    """Key -> the row without its answer."""


@dataclass
class Generated:
    """failures: reason -> how many requests ended so; they are asked again next time."""

    num_made: int = 0
    failures: Counter[str] = field(default_factory=Counter)


def make_plan(data: Data, *, model: str, numerics: str, seed: int) -> Plan:
    """What has to be there for a benchmark.

    Args:
        model: identity. numerics: of the backend. seed: of the evaluation.
    """
    benchmark = data.benchmark
    sampling = {"backend": numerics, **asdict(benchmark.sampling)}
    requests: list[Request] = []
    rows: dict[str, SampleRow] = {}
    for item in data.items:
        for index in range(benchmark.k):
            row = SampleRow(
                model=model, benchmark=benchmark.name, data=data.sha256, item=item.id, index=index,
                prompt=item.prompt_hash, sampling=sampling, seed=seed,
            )  # fmt: skip
            key = sample_key(**row)  # type: ignore[arg-type,misc]
            rows[key] = SampleRow(key=key, **row)  # type: ignore[misc]
            requests.append(
                Request(key, benchmark.name, item.id, index, seed_of(key), item.messages, benchmark.sampling)
            )
    return Plan(data, tuple(requests), rows)


def generate(
    plan: Plan,
    backend: Backend,
    samples: KeyedFile,
    progress: Progress,
    on_sample: Callable[[Mapping[str, Any]], None],
) -> Generated:
    """Make what is missing. Whatever ends it, what came so far is in the file.

    Args:
        on_sample: told of each row after it was written.
    """
    found = Generated()
    for outcomes in backend.generate(plan.requests, samples.keys):
        rows: list[SampleRow] = []
        for request, answer in outcomes:
            if isinstance(answer, Failure):
                found.failures[answer.reason] += 1
                progress.failed()
            elif request.key not in samples:
                rows.append(
                    SampleRow(
                        **plan.rows[request.key],
                        response=answer.text,
                        finish_reason=answer.finish_reason,
                        num_tokens=answer.num_tokens,
                    )
                )
        samples.append(rows)
        for row in rows:
            found.num_made += 1
            progress.made(row["num_tokens"])
            on_sample(row)
        progress.show()
    return found
