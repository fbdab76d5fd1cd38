"""What a run's numbers say, in words: did it learn, did entropy collapse, what was forgotten, does the clip act.

Every bound that decides a word stands here once, with where it comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psft.reports import benchmarks, series
from psft.reports.groups import epsilon_high
from psft.reports.load import Run
from psft.runs.alerts import LEAST_CLIP_FRACTION

NUM_ERRORS = 2.0
"""Standard errors a change must exceed to be called one: about 95 % confidence."""
LEAST_GAIN = 0.02
"""Nats per token that held-out or training NLL must fall where no standard error is known. Our choice."""
COLLAPSED_SHARE = 1 / 3
"""Entropy at the end, as a share of that at the beginning, below which it may have collapsed. Our choice: runs of a
135M model on GSM8K that overfit ended at a fifth, those with the best held-out NLL at two thirds and more."""
OVERCONFIDENT_SHARE = 0.3
"""Entropy over held-out NLL at the end, below which a low entropy is a collapse: a model that is as sure as it is right
has the two equal. Our choice between what those runs had: 0.13 and 0.14 where they overfit, else 0.48 and more."""
MOST_DRIFT = 0.1
"""Nats per token on general prompts from which on we say that the model forgets: the default of `drift_budget`, which a
run may set otherwise. Our choice."""
MOST_CLIP_FRACTION = 0.2
"""Share of tokens clipped above which the bound, not the data, sets the pace. Our choice."""
ENDS_SHARE = 0.1
"""Beginning and end of a series of single steps are means of this share of them: no mini-batch decides alone."""

THRESHOLDS = {
    f"{NUM_ERRORS:g} standard errors": "a change smaller than this is called none (about 95 % confidence)",
    f"{LEAST_GAIN:g} nats per token": "the same where no standard error is known (our choice)",
    f"{COLLAPSED_SHARE:.0%} of the first entropy": "below this it has collapsed (our choice), unless the next holds",
    f"{OVERCONFIDENT_SHARE:.0%} of the held-out NLL": "entropy above this fell since the data was learnt (our choice)",
    f"{MOST_DRIFT:g} nats per token of drift": "above this the model forgets (our choice), unless drift_budget says so",
    f"{LEAST_CLIP_FRACTION:.0%} of tokens clipped": "below this PSFT is plain SFT (measured on a 135M model)",
    f"{MOST_CLIP_FRACTION:.0%} of tokens clipped": "above this the bound sets the pace (our choice)",
}
"""The bounds as the page lists them."""


@dataclass(frozen=True)
class Finding:
    """The answer to one question. state: good, warn, bad or unknown. values: the numbers in `text`, exact, by name."""

    question: str
    state: str
    answer: str
    text: str
    values: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def findings(run: Run) -> dict[str, Finding]:
    """The answers about one run, by name: ended, learned, collapsed, forgot, clip."""
    return {
        "ended": _ended(run),
        "learned": _learned(run),
        "collapsed": _collapsed(run),
        "forgot": _forgot(run),
        "clip": _clip(run),
    }


def ends(values: np.ndarray) -> tuple[float, float] | None:
    """Mean of the first and of the last tenth of a series, null left out; None if there is nothing."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    size = max(1, math.ceil(len(values) * ENDS_SHARE))
    return float(values[:size].mean()), float(values[-size:].mean())


def _ended(run: Run) -> Finding:
    question = "How did it end?"
    reason = run.exit_reason
    values = {"steps": float(run.num_steps)}
    steps = f"{run.num_steps:,} steps recorded"
    wall = run.summary.get("wall_time_s")
    if run.is_over and isinstance(wall, int | float):
        values["wall_time_s"] = wall
        steps += f", {duration(wall)}"
    bad = run.info.get("bad_steps")
    bad_steps = [row for row in bad if isinstance(row, dict)] if isinstance(bad, list) else []
    short, _, why = reason.partition(": ")
    text = f"{why}; {steps}." if why else f"{steps[:1].upper()}{steps[1:]}."
    if bad_steps:
        numbers = ", ".join(str(row.get("step")) for row in bad_steps[:5])
        more = f" and {len(bad_steps) - 5} more" if len(bad_steps) > 5 else ""
        text += f" Passed over because loss or gradient was not finite: step {numbers}{more} (run.json, bad_steps)."
        values["bad_steps"] = float(len(bad_steps))
    if reason == "finished":
        return Finding(question, "warn" if bad_steps else "good", "finished", text, values)
    states = {"failed": "bad", "interrupted": "warn", "stopped": "warn"}
    return Finding(question, states.get(short, "unknown"), short, text, values)


def _learned(run: Run) -> Finding:
    question = "Did it learn?"
    if run.has("rewards_accuracy"):
        return _grew(run, question, "rewards_accuracy", "pairs ranked right")
    if run.has("reward_mean"):
        return _grew(run, question, "reward_mean", "mean reward")
    name, rows = series.held_out(run)
    if len(rows) >= 2:
        return _learned_held_out(question, name, rows)
    both = ends(run.column("nll"))
    if both is None or run.num_steps < 2:
        return Finding(question, "unknown", "not known", "No held-out NLL and too few steps to tell.")
    first, last = both
    has_gained = first - last > LEAST_GAIN
    text = (
        f"Training NLL {first:.3f} to {last:.3f} nats per token (means of the first and last {ENDS_SHARE:.0%} of the "
        "steps). Training NLL alone cannot tell learning from recall: "
    )
    if rows:
        text += f"that of {name} has been measured once, at step {rows[0]['step']:g}, and a second time will tell."
    else:
        text += "give --eval_dataset."
    answer = "on its training data" if has_gained else "no"
    return Finding(question, "warn" if has_gained else "bad", answer, text, {"first": first, "last": last})


def _learned_held_out(question: str, name: str, rows: list[dict[str, Any]]) -> Finding:
    first, last = rows[0], rows[-1]
    best = min(rows, key=lambda row: row["value"])
    values = {"first": first["value"], "best": best["value"], "last": last["value"], "best_step": float(best["step"])}
    text = f"Held-out NLL of {name}: {_with_error(first)} at step {first['step']:g}, "
    if best is not last:
        text += f"best {_with_error(best)} at step {best['step']:g}, "
    which = "best and last" if best is last else "last"
    text += f"{which} {_with_error(last)} at step {last['step']:g} (nats per token)."
    if last["value"] - best["value"] > _margin(best, last):
        state, answer = "warn", "yes, then it got worse"
        if best is first:
            state, answer = "bad", "no, it got worse"
    elif first["value"] - last["value"] > _margin(first, last):
        state, answer = "good", "yes"
    elif first["step"] > 0:
        state, answer = "warn", f"not since step {first['step']:g}"
        text += " Nothing was measured before the first step: give --eval_on_start true."
    else:
        state, answer = "bad", "not measurably"
    return Finding(question, state, answer, text, values)


def _margin(a: dict[str, Any], b: dict[str, Any]) -> float:
    """What two values must differ by: errors taken as independent, which for the same rows is the safe side."""
    errors = [row["stderr"] for row in (a, b) if row.get("stderr") is not None]
    return NUM_ERRORS * math.hypot(*errors) if len(errors) == 2 else LEAST_GAIN


def _with_error(row: dict[str, Any]) -> str:
    stderr = row.get("stderr")
    return f"{row['value']:.3f}" + (f" \u00b1 {stderr:.3f}" if stderr is not None else "")


def _grew(run: Run, question: str, field: str, words: str) -> Finding:
    both = ends(run.column(field))
    assert both is not None, field  # a column is kept only if it holds a number
    first, last = both
    text = f"{words} {first:.3f} to {last:.3f} (means of the first and last {ENDS_SHARE:.0%} of the steps)."
    has_grown = last > first
    return Finding(question, "good" if has_grown else "bad", "yes" if has_grown else "no", text.capitalize(),
                   {"first": first, "last": last})  # fmt: skip


def _collapsed(run: Run) -> Finding:
    question = "Did entropy collapse?"
    both = ends(run.column("entropy"))
    if both is None or run.num_steps < 2:
        return Finding(question, "unknown", "not known", "Entropy was not recorded for two steps or more.")
    first, last = both
    text = (
        f"Entropy {first:.3f} to {last:.3f} nats per token (means of the first and last {ENDS_SHARE:.0%} of the steps)"
    )
    values = {"first": first, "last": last}
    text += f", {last / first:.0%} of what it was." if first > 0 else "."
    if any(alert.name == "entropy_sawtooth" for alert in run.alerts):
        return Finding(question, "bad", "it falls at every epoch", text, values)
    if not last < COLLAPSED_SHARE * first:
        return Finding(question, "good", "no", text, values)
    _, rows = series.held_out(run)
    if not rows or rows[-1]["value"] <= 0:
        return Finding(question, "bad", "it seems so", f"{text} Without a held-out NLL to hold it against.", values)
    nll = values["held_out_nll"] = rows[-1]["value"]
    text += f" That is {last / nll:.0%} of the last held-out NLL"
    if last < OVERCONFIDENT_SHARE * nll:
        return Finding(question, "bad", "yes", f"{text}: the model is surer than it is right.", values)
    return Finding(question, "good", "no", f"{text}: it fell because the data was learnt.", values)


def _forgot(run: Run) -> Finding:
    question = "Did it forget?"
    tale = _lost_scores(run)
    measured = series.drift(run)
    if measured is None:
        if tale:
            return Finding(question, "bad", "yes", tale)
        return Finding(
            question, "unknown", "not measured", "No retention probe and no out-of-domain score was recorded."
        )
    steps, drift, errors = measured
    if steps[-1] == 0 and not tale:
        text = "The probe has answers of the untrained model, and has not been asked again yet."
        return Finding(question, "unknown", "not measured yet", text)
    error = None if errors is None or not np.isfinite(errors[-1]) else float(errors[-1])
    budget = drift_budget(run)
    shown = f"{drift[-1]:.4f}" + (f" \u00b1 {error:.4f}" if error is not None else "")
    text = f"Drift on general prompts {shown} nats per token at step {steps[-1]:g} (budget {budget:g}). {tale}".rstrip()
    values = {"drift": float(drift[-1]), "step": float(steps[-1]), "budget": budget}
    if error is not None:
        values["stderr"] = error
    margin = NUM_ERRORS * (error or 0.0)
    if drift[-1] - margin > budget or tale:
        return Finding(question, "bad", "yes", text, values)
    if drift[-1] - margin > 0:
        return Finding(question, "good", "little", text, values)
    return Finding(question, "good", "nothing measurable", text, values)


def drift_budget(run: Run) -> float:
    value = run.config.get("drift_budget")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else MOST_DRIFT


def _lost_scores(run: Run) -> str:
    """Out-of-domain scores that ended measurably below what the untrained model had; "" if none did."""
    lost = []
    for score in benchmarks.scores([run], "out"):
        found = benchmarks.points(run, score)
        if found is None:
            continue
        steps, y, errors = found
        if errors is None or steps[0] != 0 or len(steps) < 2:
            continue
        if y[0] - y[-1] > NUM_ERRORS * math.hypot(errors[0], errors[-1]):
            lost.append(f"{benchmarks.title(score)} {y[0]:.1%} to {y[-1]:.1%}")
    return f"Out of domain it lost: {', '.join(lost)}." if lost else ""


def _clip(run: Run) -> Finding:
    question = "Does the clip act?"
    share = series.clip_share(run)
    name = run.objective.get("name") or "this objective"
    if share is None:
        sizes = run.column("num_mini_batches")
        epsilon = epsilon_high(run)
        if epsilon is not None and np.isfinite(sizes).any() and np.nanmax(sizes) < 2:
            text = "Every window is one mini-batch, so each ratio is 1 and nothing can be clipped: this is plain SFT."
            return Finding(question, "warn", "it cannot", text)
        if epsilon is None and run.objective:
            return Finding(question, "good", "no clip", f"The objective {name} has no bound on a ratio.")
        return Finding(
            question, "unknown", "not known", "No clip fraction has been recorded beyond first mini-batches."
        )
    if math.isinf(epsilon_high(run) or 0.0):
        return Finding(
            question, "warn", "switched off", "epsilon_high is inf: nothing is ever clipped.", {"share": share}
        )
    text = f"{share:.2%} of the tokens of mini-batches 2 and later were clipped."
    if share > MOST_CLIP_FRACTION:
        return Finding(
            question, "warn", "very much", f"{text} The bound, not the data, sets the pace.", {"share": share}
        )
    if share < LEAST_CLIP_FRACTION:
        return Finding(question, "warn", "hardly", f"{text} This is close to plain SFT.", {"share": share})
    return Finding(question, "good", "yes", text, {"share": share})


def duration(seconds: float) -> str:
    """`4 min 10 s`, `2 h 5 min`."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
