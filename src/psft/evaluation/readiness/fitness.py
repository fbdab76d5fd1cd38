"""Whether RL can learn from a model's answers at all. The bounds are ours, each with its reason.

A model is not ready if one of these lies on the wrong side with its whole 95 % interval. Where only the value does, it
is doubtful.

readable       at least 0.5: below it most of the reward is about the form of an answer, which fine-tuning teaches for
               less. Below 0.9 is a warning.
mixed groups   at least 0.1: below it more than 10 prompts are sampled for one that teaches something, and 10 rounds of
               dynamic sampling are where `psft grpo` gives a batch up by default.
room           at least 0.05: less is within the noise of most benchmarks.
entropy        below 0.1 nats per token is a warning, not more: fewer than exp(0.1) = 1.1 tokens to choose from. The
               paper (section 4.2, figure 4) has RL rise from the start with more entropy; it names no least.
drift          above 0.1 nats per token is a warning: the default of `--drift_budget` of a training run.
"""

from __future__ import annotations

from dataclasses import dataclass

from psft.evaluation.readiness.measures import Measures
from psft.evaluation.statistics import Estimate

READABLE_LEAST, READABLE_GOOD = 0.5, 0.9
MIXED_LEAST = 0.1
ROOM_LEAST = 0.05
ENTROPY_LOW = 0.1
DRIFT_HIGH = 0.1
AVERAGE_LOW, AVERAGE_HIGH = 0.1, 0.9
"""Beyond them prompts of which nothing can be learnt are called too hard, or too easy."""

_SAID = {
    "readable": "the share of answers that end and can be read is",
    "mixed": "the share of groups of mixed outcome is",
    "room": "pass@k is above avg@k by",
}


@dataclass(frozen=True)
class Fitness:
    """problems: why a model is not ready. warnings: what to know of it. is_doubtful: a bound for being ready is missed,
    but not with the whole interval."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    is_doubtful: bool = False


def fitness_of(model: Measures) -> Fitness:
    """What stands against starting RL from a model."""
    problems: list[str] = []
    doubts: list[str] = []
    warnings: list[str] = []

    def below(what: str, least: float, why: str) -> None:
        estimate = model.estimate(what)
        if estimate is None or estimate.value >= least:
            return
        is_sure = estimate.high is not None and estimate.high < least
        (problems if is_sure else doubts).append(f"{_SAID[what]} {share_in_words(estimate)}: {why}")

    form = "most of the reward would be about the form of an answer. Fine-tune on; if many are cut, allow longer ones"
    below("readable", READABLE_LEAST, form)
    readable = model.estimate("readable")
    if readable is not None and READABLE_LEAST <= readable.value < READABLE_GOOD:
        warnings.append(
            f"{_SAID['readable']} {share_in_words(readable)}: part of the reward will be about form, or length"
        )
    average, room = model.estimate("average"), model.estimate("room")
    if average is not None and average.value > AVERAGE_HIGH:
        because = "the prompts are too easy for it. Judge again on harder ones"
    elif average is not None and average.value < AVERAGE_LOW:
        because = "the prompts are too hard for it, or the grader does not understand its answers. Take easier ones"
    else:
        because = "it gives nearly the same answer to a prompt each time. Take an earlier checkpoint, or other prompts"
    below("mixed", MIXED_LEAST, f"nearly all groups are right or wrong as a whole; {because}")
    if room is not None and not any(text.startswith(_SAID["mixed"]) for text in problems):
        below("room", ROOM_LEAST, f"RL has little to turn into right answers; {because}")
    entropy = model.estimate("entropy")
    if entropy is not None and entropy.value < ENTROPY_LOW:
        warnings.append(
            f"its entropy is {entropy.value:.3f} nats a token: it is nearly always sure of the next token, and RL "
            "explores little"
        )
    drift = model.estimate("drift")
    if drift is not None and drift.value > DRIFT_HIGH:
        warnings.append(
            f"it has drifted {drift.value:.3f} nats a token from its base on general prompts, above {DRIFT_HIGH:g}: "
            "look at what it forgot (psft eval --suite ood)"
        )
    return Fitness(tuple(problems), (*doubts, *warnings), bool(doubts))


def share_in_words(estimate: Estimate | None) -> str:
    """`34% (21% to 50%)`."""
    if estimate is None:
        return "not known"
    ends = "" if estimate.low is None or estimate.high is None else f" ({estimate.low:.0%} to {estimate.high:.0%})"
    return f"{estimate.value:.0%}{ends}"
