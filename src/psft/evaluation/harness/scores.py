"""lm-eval's results of a task in the form of our results file, as rows of eval.jsonl, and as a table to read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from psft.evaluation.harness.data import LocalData
from psft.evaluation.harness.registry import HarnessTask
from psft.evaluation.results import mean_of
from psft.evaluation.samples import digest
from psft.evaluation.statistics import bootstrap_interval, mean_over_problems
from psft.evaluation.text_table import aligned, interval, with_error
from psft.runs import EvalRow

_SAME = 1e-9


def describe(task: HarnessTask, found: Mapping[str, Any], data: LocalData | None) -> dict[str, Any]:
    """What our results file says of a task.

    `accuracy` is the task's main metric as mean over items, with the error over items; `harness.metrics` has every
    metric as lm-eval gives it, with its own error. There is no accuracy where the metric is no mean of values in 0..1.

    Args:
        found: lm-eval's results with samples.
    """
    leaves = list(found["configs"])
    metrics = _metrics(task, found)
    main = _main_metric(task, metrics)
    items = _items(task.task, found["samples"], main)
    num_items = sum(found["n-samples"][leaf]["effective"] for leaf in leaves)
    shots = sorted({found["n-shot"].get(leaf, 0) for leaf in leaves})
    source = data.source if data is not None else f"hub:{found['configs'][leaves[0]].get('dataset_path')}"
    result: dict[str, Any] = {
        "benchmark": task.task,
        "title": task.title,
        "kind": "harness",
        "k": 1,
        "n": num_items,
        "samples": num_items,
        "missing_samples": 0,
        "data": {
            "source": source,
            "sha256": data.sha256 if data is not None else _content_hash(found["samples"]),
            "rows": sum(found["n-samples"][leaf]["original"] for leaf in leaves),
            "limit": task.limit,
            "notes": list(data.notes) if data is not None else [],
        },
        "prompt": {"sha256": _prompt_hash(found["samples"]), "num_fewshot": shots[0] if len(shots) == 1 else shots},
        "sampling": {leaf: found["configs"][leaf].get("generation_kwargs") for leaf in leaves[:1]},
        "grader": {"name": "lm-eval", "metric": main},
        "harness": {
            "task": task.task,
            "lm_eval_version": found["lm_eval_version"],
            "task_versions": {leaf: found["versions"][leaf] for leaf in leaves},
            "metrics": metrics,
            "subtasks": {leaf: _numbers(found["results"][leaf]) for leaf in leaves} if leaves != [task.task] else {},
        },
    }
    means = list(items.values())
    if means and _is_share(means) and math.isclose(sum(means) / len(means), metrics[main]["value"], abs_tol=_SAME):
        result["accuracy"] = asdict(mean_over_problems(means))
        result["accuracy_bootstrap"] = bootstrap_interval(means)
        result["items"] = {name: [value] for name, value in items.items()}
    return result


def _metrics(task: HarnessTask, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each `METRIC,FILTER` of the task or group with lm-eval's value and standard error.

    A tag, which is a list of tasks without a score of its own, gets the means weighted by items.
    """
    own = found["results"].get(task.task, {})
    if any("," in key for key in own):
        return _numbers(own)
    leaves = [(_numbers(found["results"][leaf]), found["n-samples"][leaf]["effective"]) for leaf in found["configs"]]
    shared = [key for key in leaves[0][0] if all(key in numbers for numbers, _ in leaves)]
    total = sum(count for _, count in leaves)
    return {
        key: {"value": sum(numbers[key]["value"] * count for numbers, count in leaves) / total, "stderr": None}
        for key in shared
    }


def _numbers(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's `acc,none` and `acc_stderr,none` as value and stderr; its "N/A" as None."""
    found = {}
    for key, value in row.items():
        metric, comma, name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = row.get(f"{metric}_stderr,{name}")
            found[key] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    return found


def _main_metric(task: HarnessTask, metrics: Mapping[str, Any]) -> str:
    if task.metric is not None and task.metric in metrics:
        return task.metric
    return next(iter(metrics))


def _items(task: str, samples: Mapping[str, Sequence[Mapping[str, Any]]], main: str) -> dict[str, float]:
    """The main metric by item, named `SUBTASK/NUMBER` in a group, else by its number."""
    metric, _, name = main.partition(",")
    found = {}
    for leaf, rows in samples.items():
        prefix = "" if leaf == task else leaf.removeprefix(f"{task}_") + "/"
        for row in rows:
            if row["filter"] == name and isinstance(row.get(metric), bool | int | float):
                found[f"{prefix}{row['doc_id']}"] = float(row[metric])
    return found


def _is_share(values: Sequence[float]) -> bool:
    return all(0 <= value <= 1 for value in values)


def _content_hash(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    return digest({leaf: [row["doc_hash"] for row in rows] for leaf, rows in samples.items()})


def _prompt_hash(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Over the prompts as sent, so it changes with template, examples and chat template."""
    return digest({leaf: [row["prompt_hash"] for row in rows] for leaf, rows in samples.items()})


def eval_rows(result: Mapping[str, Any], step: int) -> list[EvalRow]:
    """Rows of eval.jsonl: accuracy, and each other metric under lm-eval's name for it."""
    found: dict[str, tuple[float, float | None]] = {}
    if "accuracy" in result:
        found["accuracy"] = (result["accuracy"]["value"], result["accuracy"]["stderr"])
    for name, entry in result["harness"]["metrics"].items():
        if "accuracy" not in result or name != result["grader"]["metric"]:
            found[name] = (entry["value"], entry["stderr"])
    return [
        EvalRow(
            step=step, benchmark=result["benchmark"], metric=metric, k=1, value=value, stderr=stderr, n=result["n"]
        )
        for metric, (value, stderr) in found.items()
    ]  # fmt: skip


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as text: percent, one line a task; other metrics as lm-eval gives them."""
    rows = [["task", "n", "shots", "metric", "score", "95 %", "other metrics"]]
    rows += [_cells(result) for result in results]
    mean = mean_of(results)
    if mean is not None:
        rows.append([f"mean of {mean.n}", "", "", "", with_error(mean.value, mean.stderr), "", ""])
    return aligned(rows, left=(0, 3, 6))


def _cells(result: Mapping[str, Any]) -> list[str]:
    metrics, main = result["harness"]["metrics"], result["grader"]["metric"]
    accuracy = result.get("accuracy")
    own = accuracy or metrics[main]
    others = [f"{name} {with_error(entry['value'], None)}" for name, entry in metrics.items() if name != main]
    return [
        result["title"],
        f"{result['n']:,}",
        str(result["prompt"]["num_fewshot"]),
        main,
        with_error(own["value"], own["stderr"]),
        interval(accuracy["low"], accuracy["high"]) if accuracy else "-",
        ", ".join(others),
    ]
