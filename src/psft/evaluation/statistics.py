"""What k sampled answers to n problems say about a model, and how surely: numpy only, no model, no file.

Samples of one problem are not independent of each other: every standard error here is over problems, each with its
mean, never over n*k answers. With 30 problems (AIME) it is 5 to 8 points whatever k is; gaps inside it say nothing.

Sources: pass@k as in Chen et al., arXiv:2107.03374; the score interval is Wilson's with the number of problems that
would give the measured standard error (a design effect, as Korn and Graubard use it for clustered surveys) and
Student's quantile, chosen because in simulation it covers best of t, bootstrap and logit intervals (tests/evaluation);
the bootstrap's percentiles are widened for small n as in Hesterberg, arXiv:1411.5279, section 5.3.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_MOST_EXACT_DOF = 300  # above it the normal's expansion is right to 1e-8


@dataclass(frozen=True)
class Estimate:
    """A mean over n problems. stderr, low, high: None for fewer than two problems. Same unit as value (0..1)."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """Mean of a - b over the n problems both were asked. p_value: of no difference, two-sided, by sign flips."""

    difference: float
    stderr: float | None
    low: float | None
    high: float | None
    p_value: float
    n: int


def mean_over_problems(values: Sequence[float]) -> Estimate:
    """Mean of one value in 0..1 per problem (its share of right answers, its pass@k) with a 95 % interval inside 0..1.

    The interval has width where all values are 0 or all are 1, too: 0 of 30 does not prove 0.

    Raises:
        ValueError: no value, or one outside 0..1.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no problem to average over")
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError("scores must lie in 0..1")
    n, mean = len(array), float(array.mean())
    if n < 2:
        return Estimate(mean, None, None, None, n)
    stderr = float(array.std(ddof=1)) / math.sqrt(n)
    low, high = _score_interval(mean, stderr, n)
    return Estimate(mean, stderr, low, high, n)


def unbounded_mean(values: Sequence[float]) -> Estimate:
    """Mean of one value of any size per problem, with Student's 95 % interval.

    Raises:
        ValueError: no value.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no problem to average over")
    n, mean = len(array), float(array.mean())
    if n < 2:
        return Estimate(mean, None, None, None, n)
    stderr = float(array.std(ddof=1)) / math.sqrt(n)
    half = t_quantile(0.5 + CONFIDENCE / 2, n - 1) * stderr
    return Estimate(mean, stderr, mean - half, mean + half, n)


def token_mean_values(sums: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """One value per problem whose mean is the mean per token, sum of sums / sum of tokens, and whose scatter its error.

    The tokens of a problem are not independent, and problems have unequally many: each value is the mean plus the
    problem's influence on it (the linearised ratio estimator), so intervals and paired tests over problems apply.

    Args:
        sums, tokens: of each problem's answers together.
    Raises:
        ValueError: no token.
    """
    x, t = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if not t.sum() > 0:
        raise ValueError("no token to average over")
    mean = x.sum() / t.sum()
    found: list[float] = (mean + (x - mean * t) / t.mean()).tolist()
    return found


def _score_interval(mean: float, stderr: float, n: int) -> tuple[float, float]:
    """Wilson's interval with as many independent problems as would give this standard error."""
    spread = mean * (1 - mean)
    if stderr == 0 and spread > 0:
        return mean, mean
    effective = spread / stderr**2 if stderr > 0 and spread > 0 else float(n)
    q2 = t_quantile(0.5 + CONFIDENCE / 2, n - 1) ** 2
    centre = (mean + q2 / (2 * effective)) / (1 + q2 / effective)
    half = math.sqrt(q2 * (spread / effective + q2 / (4 * effective**2))) / (1 + q2 / effective)
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def independent_mean(values: Sequence[float], stderrs: Sequence[float | None]) -> Estimate:
    """Mean of measurements that share no item, so that their errors are independent; no error unless all have one.

    The interval is the normal's: each measurement is a mean over many problems by itself.

    Raises:
        ValueError: no value.
    """
    if not len(values):
        raise ValueError("nothing to average over")
    n, value = len(values), float(np.mean(values))
    known = [error for error in stderrs if error is not None]
    if len(known) < n:
        return Estimate(value, None, None, None, n)
    stderr = math.sqrt(sum(error**2 for error in known)) / n
    half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * stderr
    return Estimate(value, stderr, value - half, value + half, n)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that k answers drawn from these without putting back hold a right one: 1 - C(n-c, k) / C(n, k). Unbiased.

    Raises:
        ValueError: k is not in 1..num_samples, or num_correct not in 0..num_samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} right among {num_samples} answers is not defined")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_score(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """maj@k of one problem: the score of the answer given most often; answers are compared without spaces and case.

    Responses without an answer have no vote; if none has one the score is 0. Answers that tie share it.
    """
    votes: Counter[str] = Counter()
    sums: dict[str, float] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            name = "".join(answer.split()).casefold()
            votes[name] += 1
            sums[name] = sums.get(name, 0.0) + score
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [name for name, count in votes.items() if count == most]
    return sum(sums[name] / most for name in winners) / len(winners)


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of the mean by resampling problems, percentiles widened for small n; None for fewer than two."""
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if n < 2:
        return None
    generator = np.random.default_rng(seed)
    block = max(1, 2_000_000 // n)  # of resamples at once: 16 MB of indices
    means = np.concatenate(
        [
            array[generator.integers(0, n, (min(block, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, block)
        ]
    )
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile(0.5 + CONFIDENCE / 2, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_test(a: Sequence[float], b: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Paired:
    """Whether two models differ on the same problems: a[i] and b[i] are their mean scores on problem i.

    The p-value flips the signs of the differences at random (a test of exchangeability, which needs no normal
    distribution); the interval is Student's.

    Raises:
        ValueError: no problem, or lists of unequal length.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError("a paired test needs the same problems of both models, at least one")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n, mean = len(differences), float(differences.mean())
    generator = np.random.default_rng(seed)
    unequal = differences[differences != 0]
    extreme = 0
    block = max(1, 2_000_000 // max(len(unequal), 1))
    bound = abs(float(unequal.sum())) * (1 - 1e-12) if len(unequal) else 0.0
    for start in range(0, resamples, block):
        signs = generator.integers(0, 2, (min(block, resamples - start), len(unequal))) * 2 - 1
        extreme += int((np.abs(signs @ unequal) >= bound).sum())
    p_value = (extreme + 1) / (resamples + 1)
    if n < 2:
        return Paired(mean, None, None, None, p_value, n)
    stderr = float(differences.std(ddof=1)) / math.sqrt(n)
    half = t_quantile(0.5 + CONFIDENCE / 2, n - 1) * stderr
    return Paired(mean, stderr, mean - half, mean + half, p_value, n)


def mixed_share(num_samples: int, num_correct: int, group_size: int) -> float:
    """Chance that a group of answers drawn from these without putting back holds right and wrong ones. Unbiased.

    Raises:
        ValueError: group_size is not in 2..num_samples, or num_correct not in 0..num_samples.
    """
    if not 2 <= group_size <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"a group of {group_size} of {num_samples} answers with {num_correct} right is not defined")
    alike = math.comb(num_correct, group_size) + math.comb(num_samples - num_correct, group_size)
    return 1.0 - alike / math.comb(num_samples, group_size)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down correction: all below 0.05 hold together, with a chance of 5 % that one does not.

    Whatever depends on what.
    """
    ranked = sorted(range(len(p_values)), key=lambda i: (p_values[i], i))
    found, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(ranked):
        largest = max(largest, min(1.0, (len(ranked) - rank) * p_values[i]))
        found[i] = largest
    return found


def independent_p_value(difference: float, stderr: float) -> float:
    """Two-sided p of a difference whose two sides are known by value and standard error only (normal)."""
    if stderr == 0:
        return 1.0 if difference == 0 else 0.0
    return 2 * NormalDist().cdf(-abs(difference) / stderr)


@functools.lru_cache(maxsize=1024)
def t_quantile(probability: float, dof: int) -> float:
    """Quantile of Student's t with `dof` degrees of freedom, probability in 0.5..1. Right to 1e-8."""
    if dof > _MOST_EXACT_DOF:
        z = NormalDist().inv_cdf(probability)
        return (
            z
            + (z**3 + z) / (4 * dof)
            + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * dof**3)
        )
    low, high = 0.0, 1.0
    while _t_central(high, dof) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, dof) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def _t_central(t: float, dof: int) -> float:
    """P(|T| <= t) in closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = dof % 2
    term, total = (cosine, cosine) if is_odd else (1.0, 1.0)
    for j in range(2 + is_odd, dof - 1, 2):
        term *= cosine**2 * (j - 1) / j
        total += term
    if not is_odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if dof > 1 else 0.0))
