"""Find an objective by registered name or by import path, and say which quantities and settings it takes."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from psft.errors import RequestError
from psft.objectives.base import ObjectiveOutput
from psft.objectives.psft import psft_loss
from psft.objectives.sft import sft_loss

QUANTITIES = frozenset({"logps", "old_logps", "completion_mask", "normalizer"})
"""What the trainer can hand to an objective; any other parameter of it is a setting."""

_REGISTERED: dict[str, Callable[..., ObjectiveOutput]] = {"psft": psft_loss, "sft": sft_loss}


@dataclass(frozen=True)
class Objective:
    """An objective function with its settings bound.

    name: as the user gave it. needs: the quantities it takes, a subset of `QUANTITIES`.
    """

    name: str
    function: Callable[..., ObjectiveOutput]
    needs: frozenset[str]
    settings: Mapping[str, Any]

    @property
    def needs_old_logps(self) -> bool:
        return "old_logps" in self.needs

    def __call__(self, **quantities: Any) -> ObjectiveOutput:
        """Call with every available quantity; those the objective does not take are left out."""
        taken = {name: value for name, value in quantities.items() if name in self.needs}
        output = self.function(**taken, **self.settings)
        if isinstance(output, Tensor):
            return ObjectiveOutput(output, {})
        return ObjectiveOutput(*output)


def objective_names() -> list[str]:
    return sorted(_REGISTERED)


def resolve_objective(name: str, settings: Mapping[str, Any]) -> Objective:
    """The objective called `name`, bound to those of `settings` that it takes.

    Args:
        name: a registered name, or "module:function" for a function of your own. Its parameters are matched by name:
            those in `QUANTITIES` are filled for each micro-batch, the others from `settings`.
        settings: available settings by name, e.g. {"epsilon_high": 0.28}.
    Raises:
        RequestError: no such objective, or one that asks for a setting there is not.
    """
    function = _REGISTERED[name] if name in _REGISTERED else _import(name)
    parameters = inspect.signature(function).parameters.values()
    needs = frozenset(p.name for p in parameters if p.name in QUANTITIES)
    wanted = [p for p in parameters if p.name not in QUANTITIES and p.kind is not p.VAR_KEYWORD]
    missing = [p.name for p in wanted if p.name not in settings and p.default is p.empty]
    if missing:
        raise RequestError(
            f"objective '{name}' takes {', '.join(missing)}, which is neither a quantity "
            f"({', '.join(sorted(QUANTITIES))}) nor a setting "
            f"({', '.join(sorted(settings))}). Rename the parameter or give it a default."
        )
    return Objective(name, function, needs, {p.name: settings[p.name] for p in wanted if p.name in settings})


def _import(name: str) -> Callable[..., ObjectiveOutput]:
    module_name, colon, function_name = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, _REGISTERED, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise RequestError(
            f"objective '{name}' is not known. {hint}Known: {', '.join(objective_names())}; or give module:function."
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise RequestError(
            f"objective '{name}' cannot be imported: {error}. Give module:function on the Python path."
        ) from error
    return function
