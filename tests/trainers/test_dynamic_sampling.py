"""Laws of dynamic sampling, without a model: what is kept, that nothing is lost or comes twice, how many rounds."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psft.errors import RunFailed
from psft.trainers.dynamic_sampling import (
    Filled,
    GroupLedger,
    Limits,
    PromptStream,
    Round,
    fill_batch,
    is_informative,
)


def rewards_of(prompt: int, visit: int, seed: int, p_mixed: float, size: int = 4) -> list[float]:
    """What the answers to a prompt get: mixed with probability `p_mixed`, else all 0 or all 1."""
    draw = random.Random(f"{seed}:{prompt}:{visit}")
    if draw.random() < p_mixed:
        num_right = draw.randint(1, size - 1)
        return [1.0] * num_right + [0.0] * (size - num_right)
    return [float(draw.random() < 0.5)] * size


class Simulation:
    """A run without a model, on `limits.num_ranks` ranks in one process."""

    def __init__(self, limits: Limits, *, num_prompts: int = 40, seed: int = 0, p_mixed: float = 0.4) -> None:
        self.limits, self.seed, self.p_mixed = limits, seed, p_mixed
        self.stream, self.ledger = PromptStream(num_prompts, seed), GroupLedger()
        self.sampled: dict[int, int] = {}  # serial -> prompt
        self.rewards: dict[int, list[float]] = {}

    def sample(self, prompts: list[int], first: int) -> Round:
        share = len(prompts) // self.limits.num_ranks
        kept = []
        for i, prompt in enumerate(prompts):
            assert first + i not in self.sampled
            self.sampled[first + i] = prompt
            self.rewards[first + i] = rewards_of(
                prompt, (first + i) // self.stream.num_prompts, self.seed, self.p_mixed
            )
            kept.append(is_informative(self.rewards[first + i], 0.0))
        return Round([kept[i : i + share] for i in range(0, len(prompts), share)], 0.5)

    def batch(self) -> Filled:
        return fill_batch(self.stream, self.ledger, self.limits, self.sample)


LIMITS = st.builds(
    lambda ranks, share, factor, rounds: Limits(ranks * share, ranks * share * factor, rounds, num_ranks=ranks),
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(20, 40),
)  # fmt: skip


@settings(max_examples=60)
@given(limits=LIMITS, seed=st.integers(0, 1000), p_mixed=st.floats(0.3, 1.0), num_batches=st.integers(1, 4))
def test_no_kept_group_is_uniform_and_none_is_lost_or_used_twice(limits, seed, p_mixed, num_batches):
    """Goes red if a uniform group is kept, a carried-over one is lost or comes twice, or a batch is not full."""
    run = Simulation(limits, num_prompts=48, seed=seed, p_mixed=p_mixed)
    used: list[int] = []
    for _ in range(num_batches):
        filled = run.batch()
        of_ranks = filled.plan.groups
        assert all(len(set(run.rewards[serial])) > 1 for of_rank in of_ranks for serial in of_rank)
        if filled.num_groups == limits.batch_size:
            assert {len(of_rank) for of_rank in of_ranks} == {limits.batch_size // limits.num_ranks}
        else:
            assert filled.num_rounds == limits.max_rounds
        used += [serial for of_rank in of_ranks for serial in of_rank]
        assert filled.num_carried_out == len(run.ledger)
    good = {serial for serial, rewards in run.rewards.items() if len(set(rewards)) > 1}
    assert len(used) == len(set(used)) and set(used) | set(run.ledger.rank_of) == good
    assert not set(used) & set(run.ledger.rank_of)


@settings(max_examples=30)
@given(
    num_prompts=st.integers(1, 30), takes=st.lists(st.integers(1, 17), min_size=1, max_size=12), seed=st.integers(0, 9)
)
def test_every_prompt_comes_once_an_epoch(num_prompts, takes, seed):
    """Goes red if the end of an epoch swallows prompts, repeats one, or depends on how much is taken at once."""
    stream, once = PromptStream(num_prompts, seed), PromptStream(num_prompts, seed)
    taken = [prompt for count in takes for prompt in stream.take(count)]
    assert taken == once.take(sum(takes))
    for start in range(0, len(taken) - num_prompts + 1, num_prompts):
        assert sorted(taken[start : start + num_prompts]) == list(range(num_prompts))
    assert stream.epoch == sum(takes) / num_prompts


def test_epochs_and_seeds_have_orders_of_their_own():
    first = PromptStream(50, 0).take(100)
    assert first[:50] != first[50:] and first[:50] != PromptStream(50, 1).take(50)
    assert PromptStream(5, 0, is_shuffled=False).take(7) == [0, 1, 2, 3, 4, 0, 1]


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), share=st.integers(1, 3), num_batches=st.integers(1, 3))
def test_many_ranks_keep_the_same_groups_as_one(seed, share, num_batches):
    """Goes red if which groups make a batch depends on the number of ranks."""
    size = 4 * share
    alone, together = (
        Simulation(Limits(size, size, 50, num_ranks=ranks), num_prompts=60, seed=seed) for ranks in (1, 4)
    )
    for _ in range(num_batches):
        one, four = alone.batch(), together.batch()
        assert one.plan.groups[0] == sorted(serial for of_rank in four.plan.groups for serial in of_rank)
        assert (one.num_rounds, one.num_kept) == (four.num_rounds, four.num_kept)
        assert all(
            move.source != move.target and move.serial in four.plan.groups[move.target] for move in four.plan.moves
        )


@pytest.mark.parametrize(("p_mixed", "size"), [(0.2, 16), (0.5, 32), (0.9, 8)])
def test_rounds_follow_the_binomial_model(p_mixed, size):
    """Without anything carried over, more than r rounds are needed if Binomial(r * size, p) < size. Goes red if rounds
    are counted wrongly, stop early, or go on when the batch is full (5 standard errors of 600 simulated batches)."""
    limits, needed = Limits(size, size, 200), []
    for seed in range(600):
        run = Simulation(limits, num_prompts=1000, seed=seed, p_mixed=p_mixed)
        needed.append(run.batch().num_rounds)
    expected = sum(below(size, rounds * size, p_mixed) for rounds in range(200))
    squares = sum((2 * rounds + 1) * below(size, rounds * size, p_mixed) for rounds in range(200))
    stderr = math.sqrt(max(squares - expected**2, 1e-12) / len(needed))
    assert abs(sum(needed) / len(needed) - expected) < 5 * stderr + 1e-9


def below(count: int, trials: int, p: float) -> float:
    """P(Binomial(trials, p) < count)."""
    return sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(min(count, trials + 1)))


def test_data_that_teach_nothing_end_with_a_reason():
    """Goes red if sampling goes on for ever, or a batch without a single good group is handed out."""
    run = Simulation(Limits(4, 4, 7), p_mixed=0.0)
    with pytest.raises(RunFailed, match="in 7 rounds all 28 prompts .* rewarded alike .*dynamic_sampling=false"):
        run.batch()


def test_a_batch_that_does_not_fill_is_taken_as_it_is():
    """Goes red if the rounds are not limited, or what was found is thrown away."""
    run = Simulation(Limits(40, 40, 3), num_prompts=200, p_mixed=0.1, seed=3)
    filled = run.batch()
    assert filled.num_rounds == 3 and 0 < filled.num_groups == filled.num_kept < 40 and not len(run.ledger)


def test_without_dynamic_sampling_every_group_is_kept_in_one_round():
    run = Simulation(Limits(8, 8, 10, is_dynamic=False), p_mixed=0.0)
    filled = run.batch()
    assert (filled.num_rounds, filled.num_groups, filled.num_kept) == (1, 8, 8)


def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped():
    """Goes red if the place in the data or a carried-over group is not in the state."""
    limits = Limits(6, 12, 30, num_ranks=2)
    whole, before = Simulation(limits), Simulation(limits)
    expected = [whole.batch().plan for _ in range(5)]
    assert [before.batch().plan for _ in range(2)] == expected[:2] and len(before.ledger)
    after = Simulation(limits)
    after.stream.load_state_dict(before.stream.state_dict())
    after.ledger.load_state_dict(before.ledger.state_dict())
    assert [after.batch().plan for _ in range(3)] == expected[2:]


@pytest.mark.parametrize(
    ("rewards", "tolerance", "is_kept"),
    [
        ([0.0, 1.0], 0.0, True), ([0.1, 0.1, 0.1], 0.0, False), ([0.1 + 0.2, 0.3], 1e-6, False),
        ([0.0, 0.0, 1.0, 1.0], 0.5, False), ([0.0, 0.0, 1.0, 1.0], 0.49, True),
        ([0.0, math.nan], 0.0, False), ([math.nan, math.nan], 0.0, False),
    ],
)  # fmt: skip
def test_a_group_is_kept_where_its_rewards_differ(rewards, tolerance, is_kept):
    """The spread is that of the population. Goes red if the tolerance itself counts as a difference, or NaN does."""
    assert is_informative(rewards, tolerance) is is_kept


def test_serials_of_a_round_go_through_the_ranks():
    ledger = GroupLedger()
    ledger.add(10, [[True, False], [False, True]])
    assert ledger.rank_of == {10: 0, 13: 1}
    ledger.add(14, [[True, True], [True, False]])
    plan = ledger.take(4, 2)
    assert plan.groups == [[10, 14], [13, 15]] and [m.serial for m in plan.moves] == [15]
    assert sorted(sum(plan.groups, [])) == [10, 13, 14, 15] and list(ledger.rank_of) == [16]


def test_the_module_needs_no_torch():
    code = "import sys, psft.trainers.dynamic_sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
