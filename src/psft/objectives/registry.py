"""Find an objective by registered name or by import path, and say which quantities and settings it takes."""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psft.errors import RequestError
from psft.objectives.asft import asft_loss
from psft.objectives.base import ObjectiveOutput
from psft.objectives.chord_phi import chord_phi_loss
from psft.objectives.dft import dft_loss
from psft.objectives.eaft import eaft_loss
from psft.objectives.gem import gem_loss
from psft.objectives.iw_sft import iw_sft_loss, iw_sft_token_loss
from psft.objectives.psft import psft_loss
from psft.objectives.psft_soft import psft_smoothed_loss, psft_soft_loss
from psft.objectives.psft_tv import psft_tv_loss
from psft.objectives.sft import sft_loss
from psft.objectives.sft_kl import sft_kl_loss, sft_kl_target_loss
from psft.ops import VOCABULARY_QUANTITIES, VocabularyQuantity

Loss = Callable[..., Any]

QUANTITIES = frozenset(
    {"logps", "entropies", "old_logps", "ref_logps", "sequence_ids", "completion_mask", "normalizer"}
) | frozenset(VOCABULARY_QUANTITIES)
"""What the trainer can hand to an objective; any other parameter of it is a setting."""


@dataclass(frozen=True)
class Variants:
    """One objective in several forms, chosen by a setting of its own. The first form is the default."""

    setting: str
    forms: Mapping[str, Loss]

    @property
    def default(self) -> str:
        return next(iter(self.forms))


_REGISTERED: dict[str, Loss | Variants] = {
    "sft": sft_loss,
    "psft": psft_loss,
    "psft_tv": psft_tv_loss,
    "psft_soft": Variants("soft_form", {"sapo": psft_soft_loss, "pspo": psft_smoothed_loss}),
    "sft_kl": Variants(
        "kl_estimator",
        {"full": sft_kl_loss, "k1": sft_kl_target_loss, "k2": sft_kl_target_loss, "k3": sft_kl_target_loss},
    ),
    "dft": dft_loss,
    "iw_sft": Variants("iw_level", {"sequence": iw_sft_loss, "token": iw_sft_token_loss}),
    "gem": gem_loss,
    "asft": asft_loss,
    "eaft": eaft_loss,
    "chord_phi": chord_phi_loss,
}

_TOKEN_LOCAL: frozenset[Loss] = frozenset(
    {
        sft_loss, psft_loss, psft_tv_loss, psft_soft_loss, psft_smoothed_loss, sft_kl_loss, sft_kl_target_loss,
        dft_loss, iw_sft_token_loss, gem_loss, asft_loss, eaft_loss, chord_phi_loss,
    }
)  # fmt: skip
"""Sums of one term a token that looks at no other token: see `Objective.is_token_local`."""


@dataclass(frozen=True)
class Objective:
    """An objective function with its settings bound.

    name: as the user gave it. needs: the quantities it takes, a subset of `QUANTITIES`. settings: every setting it
    takes, defaults filled in. vocabulary: those of `needs` that are computed from whole rows of logits.
    """

    name: str
    function: Loss
    needs: frozenset[str]
    settings: Mapping[str, Any]
    vocabulary: tuple[VocabularyQuantity, ...]

    @property
    def needs_old_logps(self) -> bool:
        return "old_logps" in self.needs

    @property
    def needs_ref_logps(self) -> bool:
        return "ref_logps" in self.needs

    @property
    def needs_ref_vocabulary(self) -> bool:
        """Whether the reference's whole distribution is needed at every token."""
        return any(quantity.needs_reference for quantity in self.vocabulary)

    @property
    def is_token_local(self) -> bool:
        """Whether loss and metrics are sums over tokens of a function of that token's own quantities.

        Then they may be evaluated on any cut of the tokens and added up, and the head computes gradients as it goes.
        A function of the user's own says so with an attribute: `my_loss.is_token_local = True`.
        """
        return self.function in _TOKEN_LOCAL or bool(getattr(self.function, "is_token_local", False))

    @functools.cached_property
    def _own(self) -> frozenset[str]:
        """The settings the function itself takes; those of vocabulary quantities go to the head."""
        return frozenset(inspect.signature(self.function).parameters) - QUANTITIES

    def __call__(self, *, overrides: Mapping[str, Any] | None = None, **quantities: Any) -> ObjectiveOutput:
        """Call with every available quantity; those the objective does not take are left out.

        Args:
            overrides: settings that differ for this call, e.g. an epsilon that a controller moves.
        Raises:
            ValueError: a quantity that the objective needs is missing or None.
        """
        missing = sorted(name for name in self.needs if quantities.get(name) is None)
        if missing:
            raise ValueError(f"objective '{self.name}' needs {', '.join(missing)}, and was called without")
        taken = {name: quantities[name] for name in self.needs}
        settings = {name: value for name, value in {**self.settings, **(overrides or {})}.items() if name in self._own}
        output = self.function(**taken, **settings)
        if isinstance(output, Tensor):
            return ObjectiveOutput(output, {})
        return ObjectiveOutput(*output)


def objective_names() -> list[str]:
    return sorted(_REGISTERED)


def resolve_objective(name: str, given: Mapping[str, Any]) -> Objective:
    """The objective called `name` with its settings.

    Args:
        name: a registered name, or "module:function" for a function of your own. Its parameters are matched by name:
            those in `QUANTITIES` are filled for each micro-batch, the others are its settings. It may take settings of
            the vocabulary quantities it uses, too.
        given: settings the user gave, e.g. {"epsilon_high": 0.2}; for the others the objective's own defaults hold.
    Raises:
        RequestError: no such objective, a setting that has no effect on it or a wrong value, or one it lacks.
    """
    entry = _REGISTERED[name] if name in _REGISTERED else _import(name)
    chosen: dict[str, Any] = {}
    if isinstance(entry, Variants):
        form = given.get(entry.setting, entry.default)
        if form not in entry.forms:
            raise RequestError(f"{entry.setting}={form!r} is not known; it is one of {', '.join(entry.forms)}.")
        chosen[entry.setting] = form
        function = entry.forms[form]
    else:
        function = entry
    needs, own, quantities = _takes(function)
    defaults = {parameter.name: parameter.default for parameter in own if parameter.default is not parameter.empty}
    names = {*chosen, *_all_settings(function)}
    idle = [setting for setting in given if setting not in names]
    if idle:
        raise RequestError("; ".join(_no_effect(name, chosen, setting, given[setting], names) for setting in idle))
    missing = [p.name for p in own if p.default is p.empty and p.name not in given and p.name not in chosen]
    if missing:
        raise RequestError(
            f"objective '{name}' takes {', '.join(missing)}, which is no quantity ({', '.join(sorted(QUANTITIES))}) "
            f"and has no value. Give it by objective_settings, rename it, or give the parameter a default."
        )
    try:
        vocabulary = tuple(q(**{s: given[s] for s in q.setting_names() if s in given}) for q in quantities)
    except (ValueError, TypeError) as error:
        raise RequestError(f"objective '{name}': {error}.") from error
    of_quantities = {s: getattr(q, s) for q in vocabulary for s in q.setting_names()}
    objective = Objective(name, function, needs, {**defaults, **of_quantities, **given, **chosen}, vocabulary)
    if name in _REGISTERED:
        _check_values(objective)
    elif objective.is_token_local and "sequence_ids" in needs:
        raise RequestError(
            f"objective '{name}' says is_token_local and takes sequence_ids: its tokens come in pieces of any kind, so "
            "what belongs to a sequence is not together. Remove one of the two."
        )
    return objective


def setting_names(name: str) -> frozenset[str]:
    """Every setting that some form of the objective takes; empty for an unknown name."""
    entry = _REGISTERED.get(name)
    if entry is None:
        return frozenset()
    forms, chosen = (entry.forms.values(), {entry.setting}) if isinstance(entry, Variants) else ([entry], set())
    return frozenset(chosen).union(*map(_all_settings, forms))


def _all_settings(function: Loss) -> set[str]:
    _, own, quantities = _takes(function)
    return {p.name for p in own} | {s for q in quantities for s in q.setting_names()}


def _takes(function: Loss) -> tuple[frozenset[str], list[inspect.Parameter], list[type[VocabularyQuantity]]]:
    """The quantities a function needs, its own settings, and the vocabulary quantities among the first."""
    parameters = inspect.signature(function).parameters.values()
    needs = frozenset(p.name for p in parameters if p.name in QUANTITIES)
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    own = [p for p in parameters if p.name not in QUANTITIES and p.kind not in variable]
    return needs, own, [VOCABULARY_QUANTITIES[n] for n in sorted(needs) if n in VOCABULARY_QUANTITIES]


def _check_values(objective: Objective) -> None:
    """Call the objective on one token, so that a wrong value is refused before anything is loaded."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    quantities: dict[str, Any] = {name: torch.zeros(1, 1) for name in QUANTITIES}
    quantities |= {"sequence_ids": torch.zeros(1, 1, dtype=torch.long), "completion_mask": mask, "normalizer": 1.0}
    try:
        objective(**quantities)
    except (ValueError, TypeError) as error:
        raise RequestError(f"objective '{objective.name}': {error}.") from error


def _no_effect(name: str, chosen: Mapping[str, Any], setting: str, value: Any, known: set[str]) -> str:
    takes = f"which takes {', '.join(sorted(known)) or 'no setting'}"
    form = "".join(f" with {key}={chosen[key]}" for key in chosen)
    refusal = f"{setting}={value} has no effect for objective '{name}'{form}, {takes}. "
    entry = _REGISTERED.get(name)
    if isinstance(entry, Variants) and setting in setting_names(name):
        forms = [key for key, function in entry.forms.items() if setting in _all_settings(function)]
        return f"{refusal}Remove it, or use {entry.setting}={' or '.join(forms)}"
    takers = [other for other in objective_names() if setting in setting_names(other)]
    if takers:
        return f"{refusal}Remove it, or use objective {' or '.join(takers)}"
    near = difflib.get_close_matches(setting, known, n=1)
    return refusal + (f"Did you mean {near[0]}?" if near else "Remove it")


def _import(name: str) -> Loss:
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
