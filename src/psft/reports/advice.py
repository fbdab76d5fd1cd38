"""The next run: one change at a time, the most urgent first, each with its reason and its command line."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psft.reports.groups import epsilon_high
from psft.reports.load import Run
from psft.reports.rerun import rerun, resume
from psft.reports.series import held_out
from psft.reports.verdict import Finding

RATE_STEP = 3.0
"""Factor by which a learning rate is changed: about half an order of magnitude, the usual grid. Our choice."""


@dataclass(frozen=True)
class Advice:
    """why: what was seen and what the change should do; command: as a person types it, "" if there is none to give."""

    why: str
    command: str = ""


def next_run(run: Run, found: Mapping[str, Finding], beside: Sequence[Run] = ()) -> Advice:
    """What to run next, from one run's findings. One change: of two at once nobody learns which one helped.

    beside: runs of the same report; what is among them already is not advised again.
    """
    for rule in (_unfinished, _failed, _worse, _collapsed, _forgetful, _unsteady, _clip, _not_learned):
        advice = rule(run, found, beside)
        if advice is not None:
            return advice
    return _onward(run, found)


def _unfinished(run: Run, found: Mapping[str, Finding], beside: Sequence[Run]) -> Advice | None:
    if run.is_over and not run.exit_reason.startswith("interrupted"):
        return None
    if not run.num_steps and not run.info:
        return Advice("Nothing has been recorded yet. Follow the run once it has begun:", watch(run))
    if run.config.get("save_strategy") == "no" and run.num_steps:
        how = "was interrupted" if run.is_over else "has not ended"
        why = f"The run {how}, and keeps no checkpoints (save_strategy=no). If it is gone, begin anew with some:"
        return Advice(why, rerun(run, {"save_strategy": "steps", "save_steps": 10}, suffix="-again"))
    command = resume(run) or ""
    if run.is_over:
        return Advice("The run was interrupted. Go on with it from its last checkpoint:", command)
    return Advice("The run has not ended. If it is no longer there, go on with it from its last checkpoint:", command)


def watch(run: Run) -> str:
    return shlex.join(["psft", "report", run.path, "--watch"])


def _failed(run: Run, found: Mapping[str, Finding], beside: Sequence[Run]) -> Advice | None:
    if not run.exit_reason.startswith("failed"):
        return None
    if run.info.get("bad_steps"):
        return _slower(
            run, "Steps whose loss or gradient was not finite were followed by failure: a lower learning rate."
        )
    return Advice("Mend what the message names, then go on from the last checkpoint:", resume(run) or "")


def _worse(run: Run, found: Mapping[str, Finding], beside: Sequence[Run]) -> Advice | None:
    name, rows = held_out(run)
    is_overfit = found["learned"].answer.endswith("worse") or any(alert.name == "overfitting" for alert in run.alerts)
    if len(rows) < 2 or not is_overfit:
        return None
    best = min(rows, key=lambda row: row["value"])
    if not best["step"]:
        return _slower(run, f"Held-out NLL of {name} only rose: the steps are too large. A lower learning rate.")
    why = f"Held-out NLL of {name} was best at step {best['step']:g} and rose from there (overfitting): stop at it."
    return Advice(why, rerun(run, {"max_steps": int(best["step"])}, suffix="-shorter"))


def _collapsed(run: Run, found: Mapping[str, Finding], beside: Sequence[Run]) -> Advice | None:
    if found["collapsed"].state != "bad":
        return None
    return _with_psft(run, beside, "Entropy collapsed", "smaller steps keep it up longer.")


def _forgetful(run: Run, found: Mapping[str, Finding], beside: Sequence[Run]) -> Advice | None:
    if found["forgot"].state != "bad":
        return None
    return _with_psft(run, beside, "The model forgets", "a lower learning rate drifts less.")


def _with_psft(run: Run, beside: Sequence[Run], what: str, slower: str) -> Advice:
    """The same with PSFT where it was SFT and that was not done yet, else smaller steps."""
    if run.objective.get("name") != "sft":
        return _slower(run, f"{what}: {slower}")
    other = next((other.label for other in beside if _is_same_with_psft(run, other)), None)
    if other is not None:
        return _slower(run, f"{what} under SFT; the same with PSFT is {other}. To compare at smaller steps: {slower}")
    why = f"{what} under SFT: the same with PSFT, whose clip holds back tokens that move too fast."
    return Advice(why, rerun(run, {"objective": "psft"}, suffix="-psft"))


def _is_same_with_psft(run: Run, other: Run) -> bool:
    names = ("learning_rate", "max_steps", "num_train_epochs", "train_batch_size", "mini_batch_size")
    is_alike = all(run.config.get(name) == other.config.get(name) for name in names)
    return is_alike and other.objective.get("name") == "psft" and _rows(run) == _rows(other)


def _rows(run: Run) -> Any:
    return run.info.get("num_train_rows")


def _unsteady(run: Run, found: Mapping[str, Finding], beside: Sequence[Run]) -> Advice | None:
    if not any(alert.name == "gradient_spike" for alert in run.alerts):
        return None
    if math.isinf(epsilon_high(run) or 0.0):
        why = "Without the clip the gradient norm jumps: put the bound back where the paper has it."
        return Advice(why, rerun(run, {"epsilon_high": 0.28}, suffix="-clip"))
    return _slower(run, "The gradient norm jumps far above its usual value: smaller steps are steadier.")


def _clip(run: Run, found: Mapping[str, Finding], beside: Sequence[Run]) -> Advice | None:
    answer = found["clip"].answer
    if answer == "it cannot":
        size = run.config.get("train_batch_size")
        if not isinstance(size, int) or size < 8 or size % 8:
            return None
        why = "One mini-batch per window is plain SFT. Cut each window into 8, as the paper does (its table 6)."
        return Advice(why, rerun(run, {"mini_batch_size": size // 8}, suffix="-windows"))
    if answer == "hardly":
        why = "The clip hardly acts, so this is SFT. Let a controller lower the bound until it clips 2 % of the tokens."
        return Advice(why, rerun(run, {"target_clip_fraction": 0.02}, suffix="-clip2"))
    if answer == "very much":
        return _slower(run, "The clip removes a large share of the gradient: the rate is too high for this bound.")
    return None


def _not_learned(run: Run, found: Mapping[str, Finding], beside: Sequence[Run]) -> Advice | None:
    if found["learned"].state != "bad":
        return None
    rate = run.config.get("learning_rate")
    if not isinstance(rate, int | float) or rate <= 0:
        return Advice("It did not learn: raise the learning rate.")
    higher = _round(rate * RATE_STEP)
    why = f"It did not learn measurably: a higher learning rate ({rate:g} to {higher:g})."
    return Advice(why, rerun(run, {"learning_rate": higher}, suffix="-higher-lr"))


def _onward(run: Run, found: Mapping[str, Finding]) -> Advice:
    """Nothing is wrong: train longer if it still gets better, else repeat with another seed to know the noise."""
    name, rows = held_out(run)
    if not rows:
        return Advice(
            "Nothing is wrong as far as can be seen, and held-out data would show more: repeat it with --eval_dataset "
            "NAME=SOURCE (rows of the same kind that are not trained on) and --eval_strategy epoch.",
        )
    if found["learned"].answer.startswith("not since"):
        why = "Nothing is wrong as far as was measured, and what came before the first evaluation was not: measure it."
        return Advice(why, rerun(run, {"eval_on_start": True}, suffix="-measured"))
    is_best_last = len(rows) >= 2 and rows[-1] is min(rows, key=lambda row: row["value"])
    if found["learned"].state == "good" and is_best_last:
        steps = run.config.get("max_steps")
        change: dict[str, Any] = {"num_train_epochs": _twice(run.config.get("num_train_epochs"))}
        if isinstance(steps, int) and steps > 0:
            change = {"max_steps": 2 * steps}
        why = f"It learned, and held-out NLL of {name} was still best at the last measurement: train twice as long."
        return Advice(why, rerun(run, change, suffix="-longer"))
    seed = run.info.get("seed")
    new = seed + 1 if isinstance(seed, int) else 1
    why = "It learned and nothing is wrong. Repeat it with another seed: only then is a difference to other runs known."
    return Advice(why, rerun(run, {"seed": new}, suffix=f"-seed{new}"))


def _slower(run: Run, why: str) -> Advice:
    rate = run.config.get("learning_rate")
    if not isinstance(rate, int | float) or rate <= 0:
        return Advice(why)
    lower = _round(rate / RATE_STEP)
    return Advice(
        f"{why.removesuffix('.')} ({rate:g} to {lower:g}).", rerun(run, {"learning_rate": lower}, suffix="-lower-lr")
    )


def _round(rate: float) -> float:
    """To one digit, as people write rates."""
    return float(f"{rate:.0e}")


def _twice(epochs: Any) -> float:
    return 2 * float(epochs) if isinstance(epochs, int | float) and epochs > 0 else 2.0
