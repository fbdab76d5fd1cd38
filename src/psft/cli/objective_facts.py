"""What `psft plan` says about an objective: what it needs, which extra passes that costs, and when it is plain SFT."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psft.objectives import Objective

_NEEDS = {
    "logps": "the policy's log-prob of each target token",
    "entropies": "the policy's entropy at each token",
    "old_logps": "the old policy's log-prob of each target token",
    "ref_logps": "the frozen reference's log-prob of each target token",
    "sequence_ids": "which sequence a token belongs to",
    "ref_kls": "the KL between policy and frozen reference over the whole vocabulary",
    "gem_gaps": "the target's lead over every other token, weighed by the policy itself",
    "topk_entropies": "the policy's entropy among its likeliest tokens",
}


def objective_facts(objective: Objective, settings: Any, *, use_peft: bool) -> list[tuple[str, str]]:
    """Definition, needs and extra passes.

    Args:
        settings: a resolved `PSFTConfig`.
    """
    definition = next(iter((objective.function.__doc__ or "").strip().splitlines()), "")
    facts = [("loss", definition)] if definition else []
    facts.append(("needs", "; ".join(text for name, text in _NEEDS.items() if name in objective.needs)))
    facts.append(("old pass", _old_pass(objective, settings)))
    facts.append(("reference", _reference(objective, settings, use_peft=use_peft)))
    return facts


def _old_pass(objective: Objective, settings: Any) -> str:
    if not objective.needs_old_logps:
        return "none: this objective has no old policy"
    if settings.mini_batch_size == settings.train_batch_size:
        return "none: one mini-batch per window, whose ratio is 1"
    return "at every window's start, one forward pass without gradient over its mini-batches 2..K"


def _reference(objective: Objective, settings: Any, *, use_peft: bool) -> str:
    named = settings.ref_model_name_or_path
    which = named or ("the model without its adapter" if use_peft else "the model as it is before training")
    if objective.needs_ref_vocabulary:
        copy = "no second copy" if use_peft and not named else "a frozen copy stays in memory"
        return f"{which}: {copy}, one forward pass without gradient at every step"
    if objective.needs_ref_logps:
        return f"{which}: one forward pass over the training set before the first step, cached, 4 bytes a token"
    return "none"


def objective_notes(objective: Objective, settings: Any) -> list[str]:
    """What the chosen settings amount to, where that is less than their names promise."""
    notes = [*_plain_sft(objective, settings)]
    bound = objective.settings
    if bound.get("epsilon_high") == math.inf:
        notes.append("epsilon_high is inf: the ratio is never clipped")
    if bound.get("tv_delta", 0) >= 1:
        notes.append(
            f"tv_delta is {bound['tv_delta']:g}: no probability can grow by more than 1, so nothing is clipped"
        )
    if settings.loss_aggregation == "micro_batch_token_mean":
        notes.append(
            "loss_aggregation is micro_batch_token_mean: the result depends on how a step is cut into micro-batches, "
            "and so on max_tokens_per_micro_batch and the number of devices"
        )
    return [*notes, *_controller(settings)]


def _plain_sft(objective: Objective, settings: Any) -> list[str]:
    name, given = objective.name, objective.settings
    if name == "sft":
        return ["this is plain SFT: objective is sft"]
    if objective.needs_old_logps and settings.mini_batch_size == settings.train_batch_size:
        scale = f", its gradient times {1 - given['soft_alpha']:g} (1 - soft_alpha)" if "soft_alpha" in given else ""
        is_plain = "this is plain SFT: " if name.startswith("psft") else ""
        return [f"{is_plain}with one mini-batch per window every ratio is 1 and nothing is ever clipped{scale}"]
    if name == "sft_kl":
        return _plain_sft_kl(given)
    if name == "asft" and given["kl_coef"] == 0:
        return ["kl_coef is 0: this is dft, and the reference is run for the log alone"]
    if name == "eaft" and given["eaft_alpha"] == 0:
        return ["this is plain SFT: eaft_alpha is 0, so every token weighs 1"]
    if name == "gem" and given["gem_beta"] == 1 and given["gem_weighting"] == "linear":
        return ["this is plain SFT: the gradient of gem with gem_beta 1 and linear weighting is that of SFT"]
    return []


def _plain_sft_kl(given: Any) -> list[str]:
    coef, estimator, direction = given["kl_coef"], given["kl_estimator"], given["kl_direction"]
    if coef == 0:
        return ["this is plain SFT: kl_coef is 0, and the reference is run for the log alone"]
    if estimator == "k1":
        factor = 1 - coef if direction == "reverse" else 1 + coef
        return [f"the {direction} k1 on target tokens scales the gradient of SFT by {factor:g}: no token is held back"]
    if estimator == "k3" and direction == "reverse" and coef <= 1:
        return [
            f"with kl_coef {coef:g} the reverse k3 on target tokens only rescales SFT's token weights, to "
            f"{1 - coef:g} + {coef:g} p_ref / p: it never pulls a token back to the reference; see docs/objectives.md"
        ]
    return []


def _controller(settings: Any) -> list[str]:
    target = "target_clip_fraction" if settings.target_clip_fraction is not None else "target_drift"
    value = getattr(settings, target)
    if value is None:
        return []
    measured = "the clip fraction" if target == "target_clip_fraction" else "|log ratio|"
    note = f"{target} {value:g}: after every window the controller moves "
    if settings.controller_adjusts == "window":
        size = settings.train_batch_size // settings.mini_batch_size
        what = f"the mini-batches per window, {size} to begin with (the steps above count windows of {size})"
    else:
        name = "epsilon_high" if settings.epsilon_high is not None else "tv_delta"
        what = f"{name}, {getattr(settings, name):g} to begin with"
    return [f"{note}{what}, until {measured} over mini-batches 2..K averages {value:g}"]
