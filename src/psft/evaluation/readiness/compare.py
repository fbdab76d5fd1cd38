"""Pairs of models by each number, on the same prompts, and who stays after all of them.

Models are compared pairwise on the same prompts (`paired_test`): first by pass@k, how far RL can come;
then by mixed groups, how much of what is sampled teaches; then by entropy, of which the paper's RL from PSFT had
more and kept more; then by drift, which is to be small. At each the best stays with all that are not proven worse
than it; Holm's correction holds over all pairs and all four numbers, so the chance of any false one is at most 5 %.
Among those that stay, the most mixed groups decide, and the words say that this is no proven difference.

avg@k is no criterion. The paper's RL from PSFT begins below SFT's and overtakes it (figure 5): a lead at the start is
said, with that remark.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from psft.evaluation.readiness.measures import Measures
from psft.evaluation.statistics import Paired, holm, independent_p_value, paired_test

SIGNIFICANT = 0.05
CRITERIA = ("best", "mixed", "entropy", "drift")
_LESS_IS_BETTER = {"drift"}


@dataclass(frozen=True)
class Comparison:
    """Of two models by one number: ahead - behind, both as names. p_holm: after the correction over all of them."""

    what: str
    ahead: str
    behind: str
    difference: float
    low: float | None
    high: float | None
    p_value: float
    p_holm: float = 1.0

    @property
    def is_proven(self) -> bool:
        return self.p_holm < SIGNIFICANT


def compare_all(models: Sequence[Measures]) -> list[Comparison]:
    """Every pair by every number that both have, on the prompts that both answered, with Holm's correction over all."""
    found: list[Comparison] = []
    for what in CRITERIA:
        for a, b in itertools.combinations(models, 2):
            test = paired(what, a, b)
            if test is None:
                continue
            sign = -1.0 if what in _LESS_IS_BETTER else 1.0
            is_a_ahead = sign * test.difference >= 0
            ahead, behind = (a, b) if is_a_ahead else (b, a)
            ends = [None if end is None else (end if is_a_ahead else -end) for end in (test.low, test.high)]
            low, high = ends if is_a_ahead else ends[::-1]
            difference = test.difference if is_a_ahead else -test.difference
            found.append(Comparison(what, ahead.name, behind.name, difference, low, high, test.p_value))
    corrected = holm([comparison.p_value for comparison in found])
    return [
        Comparison(**{**vars(comparison), "p_holm": p_holm})
        for comparison, p_holm in zip(found, corrected, strict=True)
    ]


def paired(what: str, a: Measures, b: Measures) -> Paired | None:
    """a against b by one number over the prompts that both answered; None where one of them lacks it."""
    if what == "drift":
        return _drift_tested(a, b)
    shared = [name for name in a.prompts if name in b.prompts]
    ours, theirs = a.values(what, shared), b.values(what, shared)
    return paired_test(ours, theirs) if shared and ours is not None and theirs is not None else None


def _drift_tested(a: Measures, b: Measures) -> Paired | None:
    """Paired where both were measured here on the same answers; else by both errors, where both are known."""
    if a.drift.values is not None and b.drift.values is not None:
        return paired_test(a.drift.values, b.drift.values)
    ours, theirs = a.drift.estimate, b.drift.estimate
    if ours is None or theirs is None or ours.stderr is None or theirs.stderr is None:
        return None
    difference, stderr = ours.value - theirs.value, math.hypot(ours.stderr, theirs.stderr)
    p_value = independent_p_value(difference, stderr)
    return Paired(difference, stderr, difference - 1.96 * stderr, difference + 1.96 * stderr, p_value, ours.n)


def eliminate(
    fit: Sequence[Measures], comparisons: Sequence[Comparison]
) -> tuple[list[Measures], list[tuple[Measures, Comparison]]]:
    """Those that are not proven worse than the best, the most mixed groups first; the others as they fell, with what
    proves it."""
    staying = list(fit)
    fallen: list[tuple[Measures, Comparison]] = []
    for what in CRITERIA:
        known = [model for model in staying if value_of(model, what) is not None]
        if len(known) < 2:
            continue
        best = max(known, key=lambda model: _merit(model, what))
        proofs = {c.behind: c for c in comparisons if c.what == what and c.ahead == best.name and c.is_proven}
        out = [model for model in staying if model.name in proofs]
        fallen += [(model, proofs[model.name]) for model in sorted(out, key=lambda model: _merit(model, what))]
        staying = [model for model in staying if model.name not in proofs]
    staying.sort(key=lambda model: tuple(-_merit(model, what) for what in ("mixed", "entropy", "best")))
    return staying, fallen


def value_of(model: Measures, what: str) -> float | None:
    """A number of a model; None where it is not known."""
    estimate = model.estimate(what)
    return None if estimate is None else estimate.value


def _merit(model: Measures, what: str) -> float:
    value = value_of(model, what)
    if value is None:
        return -math.inf
    return -value if what in _LESS_IS_BETTER else value
