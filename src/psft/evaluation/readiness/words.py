"""A verdict in sentences and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from psft.evaluation.readiness.compare import SIGNIFICANT, Comparison, paired, value_of
from psft.evaluation.readiness.fitness import Fitness, share_in_words
from psft.evaluation.readiness.measures import Measures
from psft.evaluation.statistics import Estimate, holm
from psft.evaluation.text_table import with_error

_POWER_Z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
"""Errors that a difference must have to be seen in 8 of 10 evaluations."""
_LEADS = {
    "best": "solves {by} points more of the prompts with one of {k} answers, so RL can come further",
    "mixed": "has {by} points more groups of mixed outcome, so more of what is sampled teaches",
    "entropy": "has {by} nats a token more entropy, so RL explores more; such starts overtook in the paper (4.2)",
    "drift": "has drifted {by} nats a token less from the base, so it forgot less",
}


def sentences(
    staying: Sequence[Measures],
    fallen: Sequence[tuple[Measures, Comparison]],
    unfit: Sequence[Measures],
    fitness: Mapping[str, Fitness],
) -> list[str]:
    """What to start from, and why.

    Args:
        staying: the start first, then those it cannot be told from. fallen: as `eliminate` gives them.
    """
    not_ready = [f"{model.name} is not ready: {text}." for model in unfit for text in fitness[model.name].problems]
    if not staying:
        return ["Start from none of these yet.", *not_ready]
    start = staying[0]
    doubts = " as far as is known: see the warnings" if fitness[start.name].is_doubtful else ""
    first = f"Start from {start.name}" if len(fitness) > 1 else f"{start.name} is ready for RL"
    lines = [f"{first}{doubts}."]
    lines += [f"Against {model.name}: {_difference(proof, start)}." for model, proof in reversed(fallen)]
    others = staying[1:]
    if others:
        names = _listed([model.name for model in others])
        lines.append(
            f"{len(start.prompts)} prompts do not tell {start.name} and {names} apart. {start.name} has the most "
            f"groups of mixed outcome, {share_in_words(start.estimate('mixed'))}; that is no proven difference."
            f"{_how_many(start, others)}"
        )
    lines += _leads(start, [*others, *(model for model, _ in fallen)])
    lines += [f"{model.name}: {text}." for model in (start, *others) for text in fitness[model.name].warnings]
    if start.drift.estimate is None:
        lines.append(f"Drift of {start.name} is {start.drift.source}.")
    if start.estimate("entropy") is None:
        lines.append("Entropy is not known: the models are not on this machine.")
    return lines + not_ready


def _difference(proof: Comparison, start: Measures) -> str:
    whom = "it" if proof.ahead == start.name else proof.ahead
    unit, form = (1, ".3f") if proof.what in ("entropy", "drift") else (100, ".1f")
    sign = -1 if proof.difference < 0 else 1  # drift is ahead where it is less
    between = ""
    if proof.low is not None and proof.high is not None:
        low, high = sorted((sign * unit * proof.low, sign * unit * proof.high))
        between = f" (95 % interval {low:{form}} to {high:{form}})"
    by = f"{unit * abs(proof.difference):{form}}"
    return f"{whom} {_LEADS[proof.what].format(by=by, k=start.k)}{between}"


def _leads(start: Measures, others: Sequence[Measures]) -> list[str]:
    """Who is ahead of the start in right answers today; a fact beside the verdict."""
    tests = [(other, paired("average", other, start)) for other in others]
    known = [(other, test) for other, test in tests if test is not None]
    corrected = holm([test.p_value for _, test in known])
    return [
        f"{other.name} gives {100 * test.difference:.1f} points more right answers today. {_of_lead(start, other)}"
        for (other, test), p_value in zip(known, corrected, strict=True)
        if test.difference > 0 and p_value < SIGNIFICANT
    ]


def _of_lead(start: Measures, other: Measures) -> str:
    ours, theirs = value_of(start, "entropy"), value_of(other, "entropy")
    if ours is None or theirs is None or ours <= theirs:
        return "If RL will be short, start from it instead."
    return (
        "In the paper RL from the start with more entropy begins below and overtakes (figures 4, 5): give RL from "
        f"{start.name} its 100 steps."
    )


def _how_many(start: Measures, others: Sequence[Measures]) -> str:
    """About how many prompts would show a difference in mixed groups as large as the one seen."""
    other = others[0]
    shared = [name for name in start.prompts if name in other.prompts]
    apart = np.subtract(start.values("mixed", shared) or [], other.values("mixed", shared) or [])
    if len(apart) < 2 or not apart.mean() > 0:
        return ""
    count = math.ceil((_POWER_Z * float(apart.std(ddof=1)) / float(apart.mean())) ** 2)
    if count > 20_000:
        return " The difference is too small to matter."
    rounded = math.ceil(count / 50) * 50
    return f" About {rounded:,} prompts would show it from {other.name}, if it is as large as it looks."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def table_rows(models: Sequence[Measures], ranking: Sequence[str], fitness: Mapping[str, Fitness]) -> list[list[str]]:
    """The numbers of all models, in the order of the ranking, as cells of text; percent and nats a token."""
    k, group = models[0].k, models[0].group_size
    rows: list[list[str]] = [
        ["model", f"avg@{k}", f"pass@{k}", "room", f"mixed of {group}", "readable", "entropy", "drift", "ready"]
    ]
    by_name = {model.name: model for model in models}
    for name in ranking:
        model = by_name[name]
        shares = [_percent_cell(model.estimate(what)) for what in ("average", "best", "room", "mixed", "readable")]
        nats = [_nats_cell(model.estimate(what)) for what in ("entropy", "drift")]
        own = fitness[name]
        rows.append([name, *shares, *nats, "no" if own.problems else "perhaps" if own.is_doubtful else "yes"])
    return rows


def _percent_cell(estimate: Estimate | None) -> str:
    return "-" if estimate is None else with_error(estimate.value, estimate.stderr)


def _nats_cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.3f}" + ("" if estimate.stderr is None else f" ± {estimate.stderr:.3f}")
