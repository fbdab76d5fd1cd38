"""Scores of one benchmark out of its samples and grades, as numbers, as rows of eval.jsonl, and as a table to read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from psft.evaluation.grading import GradeRow
from psft.evaluation.items import Data
from psft.evaluation.results_file import TRUNCATED
from psft.evaluation.samples import SampleRow, digest
from psft.evaluation.statistics import (
    Estimate,
    bootstrap_interval,
    independent_mean,
    majority_score,
    mean_over_problems,
    paired_test,
    pass_at_k,
)
from psft.evaluation.text_table import aligned, interval, percent, with_error
from psft.runs import EvalRow


@dataclass
class ItemScores:
    """What is known of one item, by sample: scores, answers found, whether truncated, tokens."""

    scores: list[float] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    details: list[Mapping[str, Any]] = field(default_factory=list)

    def add(self, sample: Mapping[str, Any] | SampleRow, grade: GradeRow) -> None:
        self.scores.append(grade["score"])
        self.answers.append(grade["extracted"])
        self.truncated.append(sample["finish_reason"] == "length")
        if sample["num_tokens"] is not None:
            self.tokens.append(sample["num_tokens"])
        self.details.append(grade["details"])

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def num_correct(self) -> int:
        return sum(score >= 1 for score in self.scores)


def describe(
    data: Data, items: Mapping[str, ItemScores], *, grader: Mapping[str, Any], hits: Collection[str] | None
) -> dict[str, Any]:
    """Everything the results file says of a benchmark.

    Args:
        items: by id; those without a sample are left out of every mean and counted as missing.
        hits: ids of items the training data hold; None = not looked for.
    """
    benchmark = data.benchmark
    measured = {item.id: items[item.id] for item in data.items if item.id in items}
    num_samples = sum(len(own.scores) for own in measured.values())
    found: dict[str, Any] = {
        "benchmark": benchmark.name,
        "title": benchmark.shown_name,
        "kind": benchmark.kind,
        "k": benchmark.k,
        "n": len(measured),
        "samples": num_samples,
        "missing_samples": len(data.items) * benchmark.k - num_samples,
        "data": {
            "source": data.source, "sha256": data.sha256, "rows": data.num_rows, "limit": benchmark.limit,
            "notes": list(data.notes),
        },
        "prompt": {
            "template": benchmark.template, "system_prompt": benchmark.system_prompt,
            "sha256": digest([benchmark.template, benchmark.system_prompt]), "shuffled_options": benchmark.shuffle,
        },
        "sampling": asdict(benchmark.sampling),
        "grader": dict(grader),
    }  # fmt: skip
    if measured:
        found |= scores(list(measured.values()), is_voting=benchmark.kind != "ifeval")
        found["items"] = {name: own.scores for name, own in measured.items()}
        if hits is not None:
            found["contamination"] = _contamination(measured, hits)
    return found


def scores(items: Sequence[ItemScores], *, is_voting: bool) -> dict[str, Any]:
    """The numbers of a benchmark: shares in 0..1 with errors over problems, lengths in tokens.

    is_voting: whether answers can be compared with each other (maj@k, no-answer rate).
    """
    means = [own.mean for own in items]
    least = min(len(own.scores) for own in items)  # k, or fewer where samples are missing
    found: dict[str, Any] = {
        "accuracy": asdict(mean_over_problems(means)),
        "accuracy_bootstrap": bootstrap_interval(means),
        "pass": {
            str(k): asdict(mean_over_problems([pass_at_k(len(own.scores), own.num_correct, k) for own in items]))
            for k in _powers(least)
        },
        "truncation_rate": _share([flag for own in items for flag in own.truncated]),
        "tokens": _lengths([count for own in items for count in own.tokens]),
    }
    if is_voting:
        votes = [majority_score(own.answers, own.scores) for own in items]
        found["majority"] = asdict(mean_over_problems(votes))
        found["no_answer_rate"] = _share([answer is None for own in items for answer in own.answers])
    return {**found, "details": _details(items)}


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})


def _share(flags: Sequence[bool]) -> float:
    return float(np.mean(flags)) if flags else 0.0


def _lengths(counts: Sequence[int]) -> dict[str, float] | None:
    if not counts:
        return None
    p50, p90, p95 = np.percentile(counts, [50, 90, 95])
    return {"mean": float(np.mean(counts)), "p50": float(p50), "p90": float(p90), "p95": float(p95), "max": max(counts)}


def _details(items: Sequence[ItemScores]) -> dict[str, float]:
    """Means of what the grader says beside the score: numbers in 0..1, and lists of them over all their entries."""
    values: dict[str, list[float]] = {}
    for own in items:
        for details in own.details:
            for name, value in details.items():
                entries = value if isinstance(value, list) else [value]
                if entries and all(isinstance(entry, bool | int | float) and 0 <= entry <= 1 for entry in entries):
                    values.setdefault(name, []).extend(map(float, entries))
    return {name: float(np.mean(entries)) for name, entries in values.items()}


def _contamination(items: Mapping[str, ItemScores], hits: Collection[str]) -> dict[str, Any]:
    clean = [own.mean for name, own in items.items() if name not in hits]
    dirty = [own.mean for name, own in items.items() if name in hits]
    return {
        "hits": sorted(name for name in items if name in hits),
        "without_hits": asdict(mean_over_problems(clean)) if clean else None,
        "hits_alone": asdict(mean_over_problems(dirty)) if dirty else None,
    }


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Paired test of two results of one benchmark over the items both have; None if they share none, or not the data.

    same_settings: whether prompt, sampling and k were the same, too.
    """
    if ours["data"]["sha256"] != theirs["data"]["sha256"] or not ours.get("items") or not theirs.get("items"):
        return None
    shared = [name for name in ours["items"] if name in theirs["items"]]
    if not shared:
        return None
    means = [[float(np.mean(side["items"][name])) for name in shared] for side in (ours, theirs)]
    is_same = all(ours[key] == theirs[key] for key in ("prompt", "sampling", "k"))
    return {**asdict(paired_test(means[0], means[1])), "same_settings": is_same}


def eval_rows(result: Mapping[str, Any], step: int) -> list[EvalRow]:
    """Rows of eval.jsonl for one benchmark: accuracy (avg@k), and pass@k, maj@k where k > 1."""
    k = result["k"]
    found = {"accuracy": result["accuracy"]}
    if k > 1:
        found[f"pass@{k}"] = result["pass"].get(str(k))
        found[f"maj@{k}"] = result.get("majority")
    return [
        EvalRow(
            step=step, benchmark=result["benchmark"], metric=metric, k=k, value=entry["value"],
            stderr=entry["stderr"], n=entry["n"],
        )
        for metric, entry in found.items()
        if entry is not None
    ]  # fmt: skip


def mean_of(results: Sequence[Mapping[str, Any]]) -> Estimate | None:
    """Mean of the benchmarks' scores, errors as independent; None for fewer than two."""
    entries = [result["accuracy"] for result in results if "accuracy" in result]
    if len(entries) < 2:
        return None
    return independent_mean([entry["value"] for entry in entries], [entry["stderr"] for entry in entries])


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as text: percent, one line a benchmark."""
    rows = [["benchmark", "n", "k", "avg@k", "95 %", "pass@k", "maj@k", "truncated", "no answer", "tokens", "p95"]]
    rows += [_cells(result) for result in results]
    mean = mean_of(results)
    if mean is not None:
        rows.append([f"mean of {mean.n}", "", "", _with_error(asdict(mean)), *[""] * 7])
    return aligned(rows)


def _cells(result: Mapping[str, Any]) -> list[str]:
    k = result["k"]
    if "accuracy" not in result:
        return [result["title"], "0", str(k), *["-"] * 8]
    accuracy, tokens = result["accuracy"], result["tokens"]
    best = result["pass"].get(str(k)) if k > 1 else None
    vote = result.get("majority") if k > 1 else None
    return [
        result["title"],
        str(result["n"]),
        str(k),
        _with_error(accuracy),
        interval(accuracy["low"], accuracy["high"]),
        percent(best["value"]) if best else "-",
        percent(vote["value"]) if vote else "-",
        percent(result["truncation_rate"]),
        percent(result["no_answer_rate"]) if "no_answer_rate" in result else "-",
        f"{tokens['mean']:.0f}" if tokens else "-",
        f"{tokens['p95']:.0f}" if tokens else "-",
    ]


def remarks(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the table should know, in words."""
    said = []
    for result in results:
        said += [f"{result['title']}: {text}" for text in _remarks(result)]
    return said


def _remarks(result: Mapping[str, Any]) -> list[str]:
    said = [f"{note}." for note in result["data"]["notes"]]
    if result["missing_samples"]:
        said.append(f"{result['missing_samples']:,} samples are missing; the score is of those there are.")
    if result.get("truncation_rate", 0) > TRUNCATED:
        limit = result["sampling"]["max_tokens"]
        said.append(
            f"{result['truncation_rate']:.0%} of the answers were cut off, at {limit:,} tokens or the model's context; "
            "they count as they stand, mostly wrong."
        )
    details = result.get("details", {})
    if {"strict", "psft"} <= set(details) and abs(details["strict"] - details["psft"]) > 1e-12:
        said.append(
            f"by the lenient rules of the paper's code {percent(details['psft'])} %, by the strict ones "
            f"{percent(details['strict'])} %."
        )
    contamination = result.get("contamination")
    if contamination is not None:
        count, clean = len(contamination["hits"]), contamination["without_hits"]
        without = f"; without them {_with_error(clean)} %." if count and clean else "."
        said.append(f"{count} of {result['n']} items are in the training data{without}")
    compared = result.get("compared")
    if compared is not None:
        said.append(
            f"{100 * compared['difference']:+.1f} points against the other model (standard error "
            f"{100 * (compared['stderr'] or 0):.1f}, p = {compared['p_value']:.2g}, {compared['n']} items"
            + (")." if compared["same_settings"] else "; their prompts, sampling or k differ).")
        )
    return said


def _with_error(entry: Mapping[str, Any]) -> str:
    return with_error(entry["value"], entry["stderr"])
