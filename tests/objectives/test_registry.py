"""Objectives by name and by path: what they need, what they take, and what is refused."""

import inspect
import re
from dataclasses import fields

import pytest
import torch

from psft.config import OBJECTIVE_SETTINGS, ObjectiveFields
from psft.errors import RequestError
from psft.objectives import objective_names, resolve_objective, setting_names
from psft.objectives.registry import _REGISTERED, QUANTITIES, Variants


def test_the_whole_family_is_registered_with_the_defaults_that_were_published():
    """Goes red if a default leaves its source: PSFT 0.28, SFT-KL 0.5, ASFT 0.1, GEM 0.7, EAFT k 20."""
    found = {name: dict(resolve_objective(name, {}).settings) for name in objective_names()}
    assert found == {
        "asft": {"kl_coef": 0.1, "kl_direction": "forward"},
        "chord_phi": {},
        "dft": {},
        "eaft": {"eaft_alpha": 1.0, "eaft_scaling": "paper", "eaft_top_k": 20},
        "gem": {"gem_beta": 0.7, "gem_weighting": "linear"},
        "iw_sft": {"iw_level": "sequence", "iw_temperature": 1.0},
        "psft": {"epsilon_high": 0.28},
        "psft_soft": {"soft_form": "sapo", "soft_temperature": 1.0},
        "psft_tv": {"tv_delta": 0.2},
        "sft": {},
        "sft_kl": {"kl_coef": 0.5, "kl_direction": "forward", "kl_estimator": "full"},
    }


def test_every_setting_of_every_objective_is_a_field_of_the_configuration_and_back():
    """Goes red if a parameter is added to an objective without a field, or a field outlives its parameter."""
    assert set().union(*map(setting_names, objective_names())) == set(OBJECTIVE_SETTINGS)
    assert all(field.default is None and field.metadata["help"] for field in fields(ObjectiveFields))


def test_the_help_of_a_setting_names_the_objectives_that_take_it_and_its_default():
    """Goes red if the help of a field drifts from the function's default."""
    for field in fields(ObjectiveFields):
        help_text = field.metadata["help"]
        takers = [name for name in objective_names() if field.name in setting_names(name)]
        assert all(re.search(rf"\b{name}\b", help_text) for name in takers), field.name
        for name in takers:
            default = resolve_objective(name, {}).settings.get(field.name)
            if isinstance(default, (int, float)):
                assert f"{default:g}" in help_text, (field.name, name, default)
            elif default is not None:
                assert default in help_text, (field.name, name, default)


@pytest.mark.parametrize(
    ("name", "given", "needs"),
    [
        ("sft_kl", {}, "ref_kls"), ("sft_kl", {"kl_estimator": "k3"}, "ref_logps"), ("asft", {}, "ref_kls"),
        ("iw_sft", {}, "ref_logps"), ("psft", {}, "old_logps"), ("gem", {}, "gem_gaps"), ("eaft", {}, "topk_entropies"),
    ],
)  # fmt: skip
def test_what_an_objective_needs_follows_from_its_form(name, given, needs):
    objective = resolve_objective(name, given)
    assert needs in objective.needs <= QUANTITIES
    assert objective.needs_ref_logps == (needs == "ref_logps")
    assert objective.needs_ref_vocabulary == (needs == "ref_kls")
    assert objective.needs_old_logps == (needs == "old_logps")
    with pytest.raises(ValueError, match=f"'{name}' needs .*{needs}.*called without"):
        objective(logps=torch.zeros(1, 1), completion_mask=torch.ones(1, 1, dtype=torch.bool), normalizer=1)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sft", {"epsilon_high": 0.28}, "epsilon_high=0.28 has no effect for objective 'sft'.*use objective psft"),
        ("psft", {"kl_coef": 0.1}, "kl_coef=0.1 has no effect.*use objective asft or sft_kl"),
        ("iw_sft", {"iw_level": "token", "iw_temperature": 2.0}, "iw_level=token.*use iw_level=sequence"),
        ("psft_soft", {"soft_alpha": 0.2}, "soft_form=sapo.*use soft_form=pspo"),
        ("gem", {"gem_betta": 0.1}, "Did you mean gem_beta?"),
        ("psft", {"epsilon_low": 0.2}, "epsilon_low=0.2 has no effect"),
        ("dft", {"kl_coef": 0.1, "tv_delta": 1.0}, "(?s)kl_coef.*tv_delta"),
        ("gem", {"gem_beta": 0.0}, "gem_beta=0"),
        ("psft", {"epsilon_high": 0.0}, "epsilon_high=0"),
        ("sft_kl", {"kl_estimator": "k4"}, "one of full, k1, k2, k3"),
        ("sft_kl", {"kl_direction": "sideways"}, "forward, reverse"),
        ("sft_kl", {"kl_coef": -1.0}, "kl_coef=-1"),
        ("eaft", {"eaft_scaling": "ln"}, "paper"),
        ("pstf", {}, "Did you mean 'psft'"),
    ],
)
def test_a_setting_without_effect_or_out_of_range_is_refused_by_name(name, given, message):
    """Goes red if an idle setting is swallowed, or a wrong value is only found at the first training step."""
    with pytest.raises(RequestError, match=message):
        resolve_objective(name, given)


def test_an_objective_of_ones_own_takes_quantities_of_the_vocabulary_and_settings(tmp_path, monkeypatch):
    (tmp_path / "own_objective.py").write_text(
        "def tempered(logps, gem_gaps, completion_mask, *, normalizer, share, sharpness=2.0):\n"
        "    return -((share * logps + gem_gaps) * completion_mask).sum() * sharpness / normalizer\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "own_objective:tempered"
    with pytest.raises(RequestError, match="takes share.*objective_settings"):
        resolve_objective(name, {})
    objective = resolve_objective(name, {"share": 0.5, "gem_beta": 0.9})
    assert dict(objective.settings) == {"share": 0.5, "sharpness": 2.0, "gem_beta": 0.9, "gem_weighting": "linear"}
    assert [quantity.gem_beta for quantity in objective.vocabulary] == [0.9]
    one, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    output = objective(logps=one, gem_gaps=one, completion_mask=mask, normalizer=3.0)
    assert output.loss.item() == -1.0 and output.metrics == {}


def test_overrides_hold_for_one_call():
    objective = resolve_objective("psft", {"epsilon_high": 0.2})
    logps, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    quantities = {"logps": logps, "old_logps": logps - 1, "completion_mask": mask, "normalizer": 1}
    assert objective(**quantities).loss.item() == pytest.approx(-1.2)
    assert objective(overrides={"epsilon_high": 0.5}, **quantities).loss.item() == pytest.approx(-1.5)
    assert objective(**quantities).loss.item() == pytest.approx(-1.2)


def test_every_form_of_an_objective_documents_equation_source_and_gradient():
    """Goes red if an objective comes without saying where it is from or what its gradient does."""
    for name, entry in _REGISTERED.items():
        for function in entry.forms.values() if isinstance(entry, Variants) else [entry]:
            text = inspect.getdoc(function) or ""
            for part in ("Source:", "Gradient:", "(B, T)", "Args:", "Returns:", "Raises:", "sum_t"):
                assert part in text, (name, part)
