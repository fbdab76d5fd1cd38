"""Results files as `psft eval` writes them, through its own `describe`: scores from a seed, no model, no data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from psft.evaluation.benchmarks import Benchmark, registered_benchmark
from psft.evaluation.items import Data, Item
from psft.evaluation.results import ItemScores, describe
from psft.runs import RunFolder


def result(
    name: str,
    skill: float,
    *,
    num_items: int = 30,
    k: int = 4,
    seed: int = 0,
    truncated: float = 0.0,
    hits: Collection[str] | None = None,
    missing: int = 0,
    data: str = "the file",
    **changes: Any,
) -> dict[str, Any]:
    """One benchmark. skill: mean chance to be right; an item's own is drawn by its number, alike for all models."""
    registered = registered_benchmark(name)
    assert isinstance(registered, Benchmark)
    benchmark = replace(registered, k=k, **changes)
    items = tuple(Item(str(i), f"question {i}", (), {}) for i in range(num_items))
    scores = {item.id: ItemScores() for item in items}
    rng = random.Random(f"{seed} {name}")
    for item in items:
        chance = min(1.0, max(0.0, skill + random.Random(f"{name} {item.id}").uniform(-0.3, 0.3)))
        for _ in range(k):
            is_right = rng.random() < chance
            sample = {"finish_reason": "length" if rng.random() < truncated else "stop", "num_tokens": 100}
            grade = {"score": float(is_right), "extracted": "1", "reason": "made", "details": {}}
            scores[item.id].add(sample, grade)  # type: ignore[arg-type]
    for item in items[:missing]:
        del scores[item.id]
    made = Data(benchmark, items, "made", hashlib.sha256(data.encode()).hexdigest(), num_items)
    return describe(made, scores, grader={"name": "made"}, hits=hits)


def write_results(
    path: Path, benchmarks: Mapping[str, float] | list[dict[str, Any]], *, model: str = "base", step: int | None = None,
    seed: int = 0,
) -> Path:  # fmt: skip
    """A results file; benchmarks: skill by name, or whole results."""
    found = benchmarks
    if isinstance(benchmarks, Mapping):
        found = [result(name, skill, seed=seed) for name, skill in benchmarks.items()]
    content = {
        "schema": 1,
        "model": {"name": Path(model).name, "asked_as": model, "identity": "made", "step": step},
        "suite": "made",
        "benchmarks": found,
    }
    return RunFolder(path.parent).write_json(path.name, content)
