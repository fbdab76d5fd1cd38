"""DAPO's dynamic sampling: which prompts are sampled, which groups of answers are kept, until a train batch is full.

A group is the answers to one prompt. Where all of them are rewarded alike, every advantage is zero and the group
teaches nothing; it is dropped and other prompts are sampled (arXiv:2503.14476, section 3.2). Good groups beyond a full
batch are carried over to the next one.

    PromptStream   every prompt once an epoch, in an order of its own        -> numbers of prompts
    is_informative the rewards of a group differ                            -> kept or dropped
    GroupLedger    the good groups that are there, and on which rank        -> a Plan: who trains on which, what moves
    fill_batch     rounds of the above until the batch is full

No torch and no communication: every rank runs this with the same numbers and comes to the same plan. Groups are told
apart by a serial number that counts sampled prompts, so that their order does not depend on how many ranks there are.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from psft.errors import RunFailed


class PromptStream:
    """Numbers of prompts without end: every prompt once an epoch, in an order drawn from seed and epoch.

    Args:
        num_prompts: rows of the data. is_shuffled: False = in the order of the data, every epoch.
    """

    def __init__(self, num_prompts: int, seed: int, *, is_shuffled: bool = True) -> None:
        self.num_prompts, self.seed, self.is_shuffled = num_prompts, seed, is_shuffled
        self.num_taken = 0
        self._order: tuple[int, list[int]] | None = None  # epoch, and its order

    @property
    def epoch(self) -> float:
        """Passes over the data, fractional."""
        return self.num_taken / self.num_prompts

    def take(self, count: int) -> list[int]:
        """The next `count` prompts; where an epoch ends among them the next one begins."""
        taken = [self._at(position) for position in range(self.num_taken, self.num_taken + count)]
        self.num_taken += count
        return taken

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_prompts)
        if self._order is None or self._order[0] != epoch:
            order = list(range(self.num_prompts))
            if self.is_shuffled:
                random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][place]

    def state_dict(self) -> dict[str, Any]:
        return {"num_taken": self.num_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_taken = int(state["num_taken"])


def is_informative(rewards: Sequence[float], tolerance: float) -> bool:
    """Whether the rewards of a group differ: their standard deviation (of the population) is above `tolerance`.

    A group with a reward that is NaN is not: see `psft.rewards.reward_set`, drop_group.
    """
    if any(reward != reward for reward in rewards):
        return False
    return statistics.pstdev(rewards) > tolerance


@dataclass(frozen=True)
class Move:
    """A group that goes from one rank to another, so that each has its share of the batch."""

    serial: int
    source: int
    target: int


@dataclass(frozen=True)
class Plan:
    """A train batch. groups: serials by rank, rising, an equal share each. moves: what has to travel for that."""

    groups: list[list[int]]
    moves: list[Move]


class GroupLedger:
    """The good groups that wait to be trained on: serial -> the rank that holds its answers. The same on every rank."""

    def __init__(self) -> None:
        self.rank_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.rank_of)

    def add(self, first_serial: int, kept_by_rank: Sequence[Sequence[bool]]) -> None:
        """Enter the groups of a round that were kept. Serials go through the ranks one after the other."""
        serial = first_serial
        for rank, kept in enumerate(kept_by_rank):
            for is_kept in kept:
                if is_kept:
                    self.rank_of[serial] = rank
                serial += 1

    def take(self, count: int, num_ranks: int) -> Plan:
        """Plan a batch of the `count` oldest groups (all, if there are fewer), and strike them off.

        A rank trains on groups of its own first; what it has beyond its share goes to ranks that lack some.
        """
        share = -(-count // num_ranks)
        taken = sorted(self.rank_of)[:count]
        groups: list[list[int]] = [[] for _ in range(num_ranks)]
        homeless = []
        for serial in taken:
            rank = self.rank_of.pop(serial)
            if len(groups[rank]) < share:
                groups[rank].append(serial)
            else:
                homeless.append((serial, rank))
        moves = []
        for serial, source in homeless:
            target = min(range(num_ranks), key=lambda rank: (len(groups[rank]), rank))
            groups[target].append(serial)
            moves.append(Move(serial, source, target))
        return Plan([sorted(of_rank) for of_rank in groups], moves)

    def state_dict(self) -> dict[str, Any]:
        return {"rank_of": [[serial, rank] for serial, rank in sorted(self.rank_of.items())]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rank_of = {int(serial): int(rank) for serial, rank in state["rank_of"]}


@dataclass(frozen=True)
class Round:
    """What sampling some prompts gave: for each rank, whether each of its groups is kept; the mean reward of all."""

    kept_by_rank: list[list[bool]]
    mean_reward: float


@dataclass(frozen=True)
class Limits:
    """batch_size: prompts of a train batch. sampling_batch_size: prompts sampled in a round, over all ranks.
    max_rounds: rounds after which a batch is taken as it is. is_dynamic: False = every group is kept, in one round."""

    batch_size: int
    sampling_batch_size: int
    max_rounds: int
    num_ranks: int = 1
    is_dynamic: bool = True


@dataclass
class Filled:
    """A train batch and how it came about. plan: may hold fewer than `batch_size` groups after `max_rounds`."""

    plan: Plan
    num_rounds: int = 0
    num_sampled: int = 0
    num_kept: int = 0
    num_carried_in: int = 0
    num_carried_out: int = 0
    mean_rewards: list[float] = field(default_factory=list)

    @property
    def num_groups(self) -> int:
        return sum(map(len, self.plan.groups))


def fill_batch(
    stream: PromptStream,
    ledger: GroupLedger,
    limits: Limits,
    sample: Callable[[list[int], int], Round],
) -> Filled:
    """Sample rounds of prompts until `batch_size` good groups are there, and plan the batch.

    Args:
        sample: (numbers of prompts, serial of the first) -> what they gave. Every rank samples its part, in order.
    Raises:
        RunFailed: not one good group in `max_rounds`.
    """
    filled = Filled(Plan([], []), num_carried_in=len(ledger))
    while len(ledger) < limits.batch_size and filled.num_rounds < limits.max_rounds:
        first = stream.num_taken
        got = sample(stream.take(limits.sampling_batch_size), first)
        kept = got.kept_by_rank if limits.is_dynamic else [[True] * len(of_rank) for of_rank in got.kept_by_rank]
        ledger.add(first, kept)
        filled.num_rounds += 1
        filled.num_sampled += limits.sampling_batch_size
        filled.num_kept += sum(map(sum, kept))
        filled.mean_rewards.append(got.mean_reward)
    if not len(ledger):
        raise RunFailed(_nothing_to_learn(filled))
    filled.plan = ledger.take(limits.batch_size, limits.num_ranks)
    filled.num_carried_out = len(ledger)
    return filled


def _nothing_to_learn(filled: Filled) -> str:
    mean = statistics.fmean(filled.mean_rewards)
    return (
        f"dynamic sampling found nothing to learn from: in {filled.num_rounds} rounds all {filled.num_sampled} prompts "
        f"had answers that were rewarded alike (mean reward {mean:.3g}). If no answer is ever right, the prompts are "
        "too hard, or the reward does not find the answers: look at answers.jsonl of the run. If all are right, they "
        "are too easy. More num_generations or a higher temperature make answers differ; dynamic_sampling=false goes "
        "on without."
    )
