"""A flag that names another objective than the recipe's leaves out what the recipe set for its own."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from psft.config import OBJECTIVE_SETTINGS, PSFTFields
from psft.errors import RequestError

if TYPE_CHECKING:
    from psft.objectives import Objective

logger = logging.getLogger(__name__)


def leave_out_other_objective(recipe: str, of_recipe: dict[str, Any], of_flags: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's settings without those that the objective named by a flag does not take; a log line says which.

    So `psft train quickstart --objective dft` works, although the recipe sets epsilon_high. Nothing is left out where
    the flags keep the recipe's objective. A flag is never left out: one without effect is refused by `PSFTConfig`.

    Args:
        recipe: as the person named it, for the message.
        of_recipe, of_flags: settings of each, already of the declared types.
    """
    from psft.objectives import resolve_objective, setting_names

    before = of_recipe.get("objective", PSFTFields.objective)
    now = of_flags.get("objective", before)
    if now == before:
        return of_recipe
    shared = {name: of_recipe[name] for name in setting_names(now) if of_recipe.get(name) is not None}
    asked_for = {name: of_flags[name] for name in OBJECTIVE_SETTINGS if of_flags.get(name) is not None}
    try:
        objective = resolve_objective(now, {**shared, **asked_for, **(of_flags.get("objective_settings") or {})})
    except RequestError:  # the flags are wrong: `PSFTConfig` says how, without the recipe's settings in between
        return _without(of_recipe, {"objective_settings", *OBJECTIVE_SETTINGS} - shared.keys())
    idle = _idle(objective, {**of_recipe, **of_flags})
    by_recipe = [name for name, value in of_recipe.items() if value is not None and name not in of_flags]
    left_out = [name for name in by_recipe if name in idle]
    kept = [name for name in by_recipe if name in objective.settings]
    if left_out:
        belongs, is_ = ("belong", "are") if len(left_out) > 1 else ("belongs", "is")
        what = _listed(of_recipe, left_out)
        logger.warning(
            "%s of recipe %s %s to objective %s and %s left out for %s.", what, recipe, belongs, before, is_, now
        )
    if kept:
        logger.warning("%s of recipe %s is kept for objective %s.", _listed(of_recipe, kept), recipe, now)
    return _without(of_recipe, left_out)


def _idle(objective: Objective, given: Mapping[str, Any]) -> set[str]:
    """Settings that say something about an objective, and nothing about this one."""
    idle = {"objective_settings", *OBJECTIVE_SETTINGS} - objective.settings.keys()
    if not (objective.needs_ref_logps or objective.needs_ref_vocabulary):
        idle |= {"ref_model_name_or_path", "ref_model_revision"}
    if not objective.needs_ref_logps:
        idle.add("ref_cache_dir")
    if not objective.needs_old_logps:
        idle.add("allow_ratio_noise")
    has_bound = not {"epsilon_high", "tv_delta"}.isdisjoint(objective.settings)
    wants_bound = given.get("target_clip_fraction") is not None or given.get("controller_adjusts") == "epsilon"
    if not objective.needs_old_logps or (wants_bound and not has_bound):
        idle |= {"target_clip_fraction", "target_drift", "controller_adjusts"}
    return idle


def _without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _listed(settings: Mapping[str, Any], names: Collection[str]) -> str:
    return ", ".join(f"{name}={settings[name]}" for name in names)
