"""Which checkpoint to start RL from, and why. No difference is named that the prompts do not show.

Models that are not fit are set aside (`fitness`), the others compared (`compare`), and both are said (`words`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psft.evaluation.readiness import fitness as bounds
from psft.evaluation.readiness.compare import SIGNIFICANT, Comparison, compare_all, eliminate, value_of
from psft.evaluation.readiness.fitness import Fitness, fitness_of
from psft.evaluation.readiness.measures import Measures
from psft.evaluation.readiness.words import sentences


@dataclass(frozen=True)
class Verdict:
    """start: the model to start from; None if none is ready. ranking: best first. lines: all of it for a person."""

    start: str | None
    ranking: list[str]
    fitness: dict[str, Fitness]
    comparisons: list[Comparison]
    lines: list[str]


def judge(models: Sequence[Measures]) -> Verdict:
    """Fitness of each model, the comparison of those that are ready, and both in words.

    Raises:
        ValueError: no model, or two of one name.
    """
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise ValueError("models to judge must be there, each by a name of its own")
    fitness = {model.name: fitness_of(model) for model in models}
    fit = [model for model in models if not fitness[model.name].problems]
    unfit = sorted((m for m in models if m not in fit), key=lambda m: -(value_of(m, "mixed") or 0.0))
    comparisons = compare_all(fit)
    staying, fallen = eliminate(fit, comparisons)
    ranking = [model.name for model in (*staying, *(model for model, _ in reversed(fallen)), *unfit)]
    start = staying[0].name if staying else None
    return Verdict(start, ranking, fitness, comparisons, sentences(staying, fallen, unfit, fitness))


def to_json(verdict: Verdict) -> dict[str, Any]:
    """For the file of the verdict, with the rules it followed."""
    return {
        "start": verdict.start,
        "ranking": verdict.ranking,
        "lines": verdict.lines,
        "fitness": {name: vars(own) for name, own in verdict.fitness.items()},
        "comparisons": [{**vars(c), "is_proven": c.is_proven} for c in verdict.comparisons],
        "thresholds": {
            "readable_least": bounds.READABLE_LEAST, "readable_good": bounds.READABLE_GOOD,
            "mixed_least": bounds.MIXED_LEAST, "room_least": bounds.ROOM_LEAST,
            "entropy_low": bounds.ENTROPY_LOW, "drift_high": bounds.DRIFT_HIGH,
            "average_low": bounds.AVERAGE_LOW, "average_high": bounds.AVERAGE_HIGH, "significant": SIGNIFICANT,
        },
    }  # fmt: skip
