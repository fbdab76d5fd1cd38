"""Laws of the statistics: unbiased, intervals that cover, equal to what a textbook gives."""

import math
from itertools import combinations

import numpy as np
import pytest

from psft.evaluation.statistics import (
    bootstrap_interval,
    holm,
    independent_mean,
    majority_score,
    mean_over_problems,
    mixed_share,
    paired_test,
    pass_at_k,
    t_quantile,
    token_mean_values,
    unbounded_mean,
)

DESIGNS = [(30, 32, 0.3, 1.2), (40, 32, 0.5, 0.5), (500, 8, 2.0, 1.0), (200, 1, 1.0, 1.0)]
"""Problems, samples each, and the beta distribution their difficulties come from: AIME, AMC, MATH-500, pass@1."""


@pytest.mark.parametrize(("n", "k", "a", "b"), DESIGNS)
def test_the_interval_covers_the_truth(n, k, a, b):
    """2,000 evaluations with known difficulty. Goes red with the standard error over n*k answers (covers 40 to 70 %),
    with a t interval cut at 0 and 1 for n = 30, or with 1 - CONFIDENCE = 0.1.
    """
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        shares = generator.binomial(k, generator.beta(a, b, n)) / k
        found = mean_over_problems(shares)
        covered += found.low <= a / (a + b) <= found.high
    assert 0.93 <= covered / 2000 <= 0.97


def test_the_bootstrap_covers_the_truth():
    """Goes red without the widening for small n (then 92 to 93 %)."""
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(2000):
        shares = generator.binomial(32, generator.beta(0.8, 0.8, 30)) / 32
        low, high = bootstrap_interval(shares, resamples=400, seed=seed)
        covered += low <= 0.5 <= high
    assert 0.93 <= covered / 2000 <= 0.97


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    """By counting subsets. Goes red with 1 - (1 - c/n)^k, the biased estimate."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                hits = [any(i < c for i in chosen) for chosen in combinations(range(n), k)]
                assert pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Goes red with the plug-in estimate, which is low by 0.02 here."""
    generator = np.random.default_rng(2)
    estimates = [pass_at_k(16, int(c), 8) for c in generator.binomial(16, 0.1, 40000)]
    assert np.mean(estimates) == pytest.approx(1 - 0.9**8, abs=4 * np.std(estimates) / 200)


def test_errors_are_over_problems_not_over_answers():
    """Eight equal answers to each of four problems tell no more than one. Goes red if k enters the standard error."""
    found = mean_over_problems([1.0, 1.0, 0.0, 0.0])
    assert found.stderr == pytest.approx(math.sqrt(1 / 3 / 4)) and found.n == 4


def test_none_right_of_thirty_is_not_proof_of_zero():
    """Goes red if a standard error of 0 makes an interval of width 0."""
    none, all_right = mean_over_problems([0.0] * 30), mean_over_problems([1.0] * 30)
    assert none.low == 0 and 0.1 < none.high < 0.15
    assert all_right.high == 1 and all_right.low == pytest.approx(1 - none.high)


def test_one_problem_has_no_error():
    """Goes red if n - 1 = 0 divides."""
    assert mean_over_problems([0.5]).stderr is None and bootstrap_interval([0.5]) is None


@pytest.mark.parametrize("values", [[], [0.5, 1.5], [float("nan")]])
def test_what_is_no_score_is_refused(values):
    """Goes red if nan or a percentage passes as a score."""
    with pytest.raises(ValueError):
        mean_over_problems(values)


def test_t_quantiles_are_those_of_the_tables():
    """Goes red if odd and even degrees of freedom are exchanged."""
    table = {1: 12.706204736, 2: 4.302652730, 3: 3.182446305, 29: 2.045229642, 300: 1.967903011, 499: 1.964729391}
    assert {dof: t_quantile(0.975, dof) for dof in table} == pytest.approx(table, abs=2e-8)


def test_the_majority_votes():
    """Goes red if None votes, if ties go to the first, or if ' 1/2' and '1/2' are two answers."""
    assert majority_score(["7", "7", "8"], [1, 1, 0]) == 1
    assert majority_score(["7", "8"], [1, 0]) == 0.5
    assert majority_score([None, None, "8"], [0, 0, 1]) == 1
    assert majority_score([None, None], [0, 0]) == 0
    assert majority_score(["1/2", "1 /2", "3"], [1, 1, 0]) == 1


def test_the_paired_test_is_level_and_sees_what_unpaired_errors_hide():
    """Under no difference p < 0.05 in about 5 % of the cases; a gap of 3 points on the same problems is seen.

    Goes red if a and b are treated as independent, or if the flips are not two-sided.
    """
    generator = np.random.default_rng(3)
    difficulty = generator.beta(0.5, 0.5, 200)
    false_alarms = 0
    for seed in range(400):
        a, b = (generator.binomial(8, difficulty) / 8 for _ in range(2))
        false_alarms += paired_test(a, b, resamples=300, seed=seed).p_value < 0.05
    assert 0.02 <= false_alarms / 400 <= 0.08
    better = np.clip(difficulty + 0.03, 0, 1)
    found = paired_test(better, difficulty)
    assert found.p_value < 0.001 and found.low > 0
    assert found.stderr < mean_over_problems(difficulty).stderr / 5


def test_equal_models_do_not_differ():
    """Goes red if 0 of 0 unequal problems divides."""
    found = paired_test([0.5, 1.0], [0.5, 1.0])
    assert (found.difference, found.p_value, found.stderr) == (0, 1, 0)


def test_a_mean_of_benchmarks_has_the_error_of_independent_ones():
    """By hand: sqrt(0.03^2 + 0.04^2) / 2 = 0.025. Goes red if errors are averaged, or a missing one counts as none."""
    found = independent_mean([0.2, 0.6], [0.03, 0.04])
    assert (found.value, found.n) == (pytest.approx(0.4), 2) and found.stderr == pytest.approx(0.025)
    assert (found.low, found.high) == (pytest.approx(0.4 - 1.96 * 0.025, abs=1e-5), pytest.approx(0.449, abs=1e-5))
    assert independent_mean([-0.2, 0.6], [0.03, None]).stderr is None
    with pytest.raises(ValueError):
        independent_mean([], [])


def test_a_groups_chance_to_be_mixed_is_the_share_of_mixed_groups():
    """Against all groups of 3 among 7. Goes red if answers are drawn with putting back."""
    for right in range(8):
        answers = [1] * right + [0] * (7 - right)
        groups = list(combinations(answers, 3))
        assert mixed_share(7, right, 3) == pytest.approx(sum(0 < sum(group) < 3 for group in groups) / len(groups))
    for wrong in ((7, 8, 3), (2, 1, 3), (7, 3, 1)):
        with pytest.raises(ValueError):
            mixed_share(*wrong)


def test_holms_correction_is_that_of_his_paper():
    """p sorted: 0.01 * 3, 0.03 * 2, 0.04 * 1, each at least the one before. Goes red with Bonferroni's factor."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_mean_per_token_has_the_error_of_a_ratio():
    """Problems with unequally many tokens, against the linearised formula and 4,000 repetitions.

    Goes red if each problem counts alike, or the tokens' own scatter is left out of the error.
    """
    values = token_mean_values([10.0, 1.0, 9.0], [20, 1, 9])
    found = unbounded_mean(values)
    assert found.value == pytest.approx(20 / 30) and found.n == 3
    residuals = [x - 20 / 30 * t for x, t in ((10, 20), (1, 1), (9, 9))]
    assert found.stderr == pytest.approx((sum(r * r for r in residuals) * 3 / 2) ** 0.5 / 30)
    generator = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(4000):
        tokens = generator.integers(1, 60, 40)
        one = unbounded_mean(token_mean_values(tokens * generator.uniform(0.2, 0.8, 40), tokens))
        means.append(one.value)
        errors.append(one.stderr)
    assert float(np.std(means)) == pytest.approx(float(np.mean(errors)), rel=0.05)
    with pytest.raises(ValueError):
        token_mean_values([], [])
