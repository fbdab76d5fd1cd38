"""The numbers of one model, prompt by prompt, with errors over prompts. numpy only.

number      of a prompt with n answers, c of them right
avg@k       c / n
pass@k      chance that k answers hold a right one; what RL can turn into avg@k without finding anything new
room        pass@k - avg@k
mixed       chance that a group of `group_size` answers holds right and wrong ones: the others teach GRPO nothing
readable    share of answers that ended by themselves and in which the grader found an answer
entropy     nats per token at temperature 1 over the model's own answers: what is left to explore
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from psft.evaluation.readiness.drift import Drift
from psft.evaluation.results import ItemScores
from psft.evaluation.statistics import (
    Estimate,
    mean_over_problems,
    mixed_share,
    pass_at_k,
    token_mean_values,
    unbounded_mean,
)

SHARES = ("average", "best", "room", "mixed", "readable")


@dataclass(frozen=True)
class Prompt:
    """What one prompt's answers say. entropy: summed, nats, over `tokens`; None where no model was asked."""

    average: float
    best: float
    mixed: float
    readable: float
    entropy: float | None = None
    tokens: int = 0

    @property
    def room(self) -> float:
        return self.best - self.average


@dataclass(frozen=True)
class Measures:
    """One model on the prompts. name: as it was asked for. k: answers a prompt. left_out: prompts that have fewer."""

    name: str
    prompts: Mapping[str, Prompt]
    k: int
    group_size: int
    drift: Drift
    left_out: int = 0

    def values(self, what: str, prompts: Sequence[str] | None = None) -> list[float] | None:
        """One value a prompt, whose mean is the number; None where it was not measured.

        Args:
            what: `average`, `best`, `room`, `mixed`, `readable`, `entropy`. prompts: which; default all.
        """
        chosen = [self.prompts[name] for name in (self.prompts if prompts is None else prompts)]
        if what != "entropy":
            return [float(getattr(prompt, what)) for prompt in chosen]
        if not chosen or any(prompt.entropy is None or not prompt.tokens for prompt in chosen):
            return None
        return token_mean_values([prompt.entropy or 0.0 for prompt in chosen], [prompt.tokens for prompt in chosen])

    def estimate(self, what: str) -> Estimate | None:
        """A number with its 95 % interval over prompts; None where it was not measured."""
        if what == "drift":
            return self.drift.estimate
        values = self.values(what)
        if not values:
            return None
        return mean_over_problems(values) if what in SHARES else unbounded_mean(values)

    def to_json(self) -> dict[str, Any]:
        """For the results file."""
        names = {
            "average": f"avg@{self.k}", "best": f"pass@{self.k}", "room": "room", "mixed": "mixed_groups",
            "readable": "readable", "entropy": "entropy_nats_per_token", "drift": "drift_nats_per_token",
        }  # fmt: skip
        found: dict[str, Any] = {"k": self.k, "group_size": self.group_size, "prompts": len(self.prompts)}
        for what, name in names.items():
            estimate = self.estimate(what)
            found[name] = None if estimate is None else asdict(estimate)
        return {**found, "drift_source": self.drift.source, "prompts_left_out": self.left_out}


def measure_prompt(
    scores: ItemScores, *, k: int, group_size: int, entropies: Sequence[tuple[float, int]] | None
) -> Prompt | None:
    """The numbers of one prompt; None if it has fewer than k answers.

    Args:
        entropies: summed entropy and tokens of each answer that has a token; None = not measured.
    """
    n = len(scores.scores)
    if n < k:
        return None
    is_readable = [answer is not None and not cut for answer, cut in zip(scores.answers, scores.truncated, strict=True)]
    return Prompt(
        average=scores.mean,
        best=pass_at_k(n, scores.num_correct, k),
        mixed=mixed_share(n, scores.num_correct, group_size),
        readable=sum(is_readable) / n,
        entropy=None if entropies is None else sum(entropy for entropy, _ in entropies),
        tokens=0 if entropies is None else sum(tokens for _, tokens in entropies),
    )
