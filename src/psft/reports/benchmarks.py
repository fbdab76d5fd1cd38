"""Which benchmarks of eval.jsonl count as in-domain, out-of-domain and alignment tax.

Any other stands under its own name.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from psft.reports.load import Run, is_number
from psft.reports.series import Points, from_rows

IN_DOMAIN = {
    "aime24": "AIME24", "aime25": "AIME25", "amc": "AMC", "math500": "MATH-500", "olympiad": "OlympiadBench",
    "minerva": "Minerva",
}  # fmt: skip
"""Paper, table 1: mathematical reasoning."""
OUT_OF_DOMAIN = {
    "gpqa": "GPQA", "arc_c": "ARC-C", "truthfulqa": "TruthfulQA", "ifeval": "IFEval", "mmlu_pro": "MMLU-Pro",
    "supergpqa": "SuperGPQA", "headqa": "HeadQA",
}  # fmt: skip
"""Paper, table 2."""
ALIGNMENT_TAX = {
    "gsm8k_cot": "GSM8K CoT", "mmlu_flan": "MMLU FLAN", "truthfulqa_mc1": "TruthfulQA mc1",
    "cmmlu": "CMMLU", "gpqa_cot": "GPQA CoT",
}  # fmt: skip
"""Paper, table 11; CoT: with a chain of thought."""
_OTHER_NAMES = {"amc23": "amc", "olympiadbench": "olympiad", "arc_challenge": "arc_c", "math_500": "math500"}
NO_SCORES = {
    "nll", "entropy", "loss", "perplexity", "mean_token_accuracy", "num_tokens", "sample_entropy", "drift",
}  # fmt: skip
"""Metrics that are no score: other figures show them, or the verdict on RL readiness (the last two)."""
_PREFERRED = ("accuracy", "exact_match", "acc", "prompt_level_loose_acc")
"""The metric a benchmark is known by, where it has several; else the first in the order of the alphabet."""

Score = tuple[str, str, Any]
"""Benchmark as eval.jsonl spells it, metric, k."""


def canonical(benchmark: str) -> str:
    """The registry's spelling: `MATH-500` -> `math500`; an unknown name comes back as it is."""
    plain = re.sub(r"[-\s]+", "_", benchmark.strip().lower())
    plain = _OTHER_NAMES.get(plain, plain)
    return plain if plain in IN_DOMAIN or plain in OUT_OF_DOMAIN or plain in ALIGNMENT_TAX else benchmark


def domain(benchmark: str) -> str:
    """`in`, `out`, `tax` or `other`."""
    name = canonical(benchmark)
    found = (("in", IN_DOMAIN), ("out", OUT_OF_DOMAIN), ("tax", ALIGNMENT_TAX))
    return next((kind for kind, names in found if name in names), "other")


def title(score: Score, *, is_alone: bool = True) -> str:
    """How a chart calls it: `AIME24, avg@32`; metric and k where they say something."""
    benchmark, metric, k = score
    name = canonical(benchmark)
    shown = {**IN_DOMAIN, **OUT_OF_DOMAIN, **ALIGNMENT_TAX}.get(name, benchmark)
    words = [] if metric in _PREFERRED else [metric.replace("_", " ")]
    if k is not None and k > 1 and f"@{k}" not in metric:
        words.append(f"avg@{k}" if metric in _PREFERRED else f"k = {k}")
    return ", ".join([shown, *words])


def scores(runs: list[Run], kind: str) -> list[Score]:
    """The scores of one domain that any run has, in the registry's order; of a known benchmark its main metric."""
    seen: dict[Score, None] = {}
    for run in runs:
        for row in run.evals:
            benchmark, metric, k = str(row.get("benchmark")), str(row.get("metric")), row.get("k")
            if metric not in NO_SCORES and is_number(row.get("value")) and domain(benchmark) == kind:
                seen[(benchmark, metric, k if is_number(k) else None)] = None
    if kind == "other":
        return sorted(seen, key=lambda score: (score[0], score[1], score[2] or 0))
    order = [*IN_DOMAIN, *OUT_OF_DOMAIN, *ALIGNMENT_TAX]
    best: dict[str, Score] = {}
    for score in seen:
        name = canonical(score[0])
        best[name] = min(score, best.get(name, score), key=_preference)
    return [best[name] for name in order if name in best]


def _preference(score: Score) -> tuple[int, str, float]:
    metric = score[1]
    place = _PREFERRED.index(metric) if metric in _PREFERRED else len(_PREFERRED)
    return place, metric, -(score[2] or 0)


def points(run: Run, score: Score) -> Points | None:
    """Steps, values and standard errors of one score of a run."""
    benchmark, metric, k = score
    name = canonical(benchmark)
    rows = [
        row
        for row in run.evals
        if canonical(str(row.get("benchmark"))) == name
        and row.get("metric") == metric
        and (row.get("k") if is_number(row.get("k")) else None) == k
        and is_number(row.get("value"))
    ]
    return from_rows(rows, "value")


def shared(runs: list[Run], among: list[Score]) -> list[Score]:
    """Those scores that every run has that has any of them: means over other sets would not compare."""
    have = [{score for score in among if points(run, score) is not None} for run in runs]
    have = [scores for scores in have if scores]
    return [score for score in among if all(score in scores for scores in have)]


def mean_points(run: Run, among: list[Score]) -> Points | None:
    """Mean over benchmarks at every step where all were measured, standard errors taken as independent.

    None for fewer than two benchmarks, or where a run lacks one.
    """
    found = [points(run, score) for score in among]
    whole = [series for series in found if series is not None]
    if len(whole) < max(2, len(found)):
        return None
    common = sorted(set.intersection(*(set(steps.tolist()) for steps, _, _ in whole)))
    if not common:
        return None
    at = [np.searchsorted(steps, common) for steps, _, _ in whole]
    values = np.array([values[i] for (_, values, _), i in zip(whole, at, strict=True)])
    if any(errors is None for _, _, errors in whole):
        return np.array(common), values.mean(axis=0), None
    errors = np.array([errors[i] for (_, _, errors), i in zip(whole, at, strict=True) if errors is not None])
    return np.array(common), values.mean(axis=0), np.sqrt((errors**2).sum(axis=0)) / len(whole)
