"""Another objective by flag: the recipe's settings give way, aloud; a flag without effect is refused."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from psft.cli.main import main
from psft.cli.objective_choice import leave_out_other_objective
from psft.cli.train import read_request
from psft.errors import RequestError

PSFT_RECIPE = {"objective": "psft", "epsilon_high": 0.2, "learning_rate": 1e-6, "target_clip_fraction": 0.02}
KL_RECIPE = {"objective": "sft_kl", "kl_coef": 0.5, "kl_direction": "reverse", "kl_estimator": "k3", "seed": 0}
REFERENCE = {"ref_cache_dir": "c", "ref_model_name_or_path": "m"}


def left_out(of_recipe: dict[str, Any], **of_flags: Any) -> set[str]:
    rest = leave_out_other_objective("mine", dict(of_recipe), of_flags)
    assert rest.items() <= of_recipe.items()
    return of_recipe.keys() - rest.keys()


@pytest.mark.parametrize(
    ("of_recipe", "of_flags", "expected"),
    [
        (PSFT_RECIPE, {}, set()),
        (PSFT_RECIPE, {"objective": "psft", "epsilon_high": 0.3}, set()),
        (PSFT_RECIPE, {"objective": "dft"}, {"epsilon_high", "target_clip_fraction"}),
        (PSFT_RECIPE, {"objective": "dft", "target_clip_fraction": 0.1}, {"epsilon_high"}),  # the flag is refused later
        (PSFT_RECIPE, {"objective": "psft_tv"}, {"epsilon_high"}),
        (PSFT_RECIPE, {"objective": "psft_soft"}, {"epsilon_high", "target_clip_fraction"}),  # it has no bound
        (PSFT_RECIPE | {"allow_ratio_noise": True}, {"objective": "psft_tv"}, {"epsilon_high"}),
        ({"epsilon_high": 0.2, "allow_ratio_noise": True}, {"objective": "sft"}, {"epsilon_high", "allow_ratio_noise"}),
        ({"target_drift": 0.1, "controller_adjusts": "window"}, {"objective": "psft_soft"}, set()),
        (
            {"target_drift": 0.1, "controller_adjusts": "epsilon"},
            {"objective": "psft_soft"},
            {"target_drift", "controller_adjusts"},
        ),
        (KL_RECIPE, {"objective": "asft"}, {"kl_estimator"}),
        (KL_RECIPE, {"objective": "gem"}, {"kl_coef", "kl_direction", "kl_estimator"}),
        (KL_RECIPE | REFERENCE, {"objective": "iw_sft"}, {"kl_coef", "kl_direction", "kl_estimator"}),
        (KL_RECIPE | REFERENCE, {"objective": "asft"}, {"kl_estimator", "ref_cache_dir"}),
        ({"objective": "iw_sft"} | REFERENCE, {"objective": "sft"}, {"ref_cache_dir", "ref_model_name_or_path"}),
        ({"objective": "sft", "gem_beta": 1.0}, {}, set()),  # the recipe contradicts itself: refused later
        ({"objective": "mine:loss", "objective_settings": {"a": 2}}, {"objective": "dft"}, {"objective_settings"}),
        ({"objective": "gem", "gem_beta": None}, {"objective": "dft"}, set()),
    ],
)  # fmt: skip
def test_only_the_recipes_idle_settings_are_left_out(of_recipe, of_flags, expected):
    """Goes red if a flag is left out, or a setting of the recipe that the new objective takes, or one it refuses stays.

    Breaks tried: `name not in of_flags` dropped; `has_bound` dropped; `objective.settings` exchanged for all settings.
    """
    assert left_out(of_recipe, **of_flags) == expected


def test_what_is_left_out_and_what_is_kept_is_said(caplog):
    """Goes red if a setting goes in silence, or a coefficient is carried to another objective in silence."""
    with caplog.at_level(logging.WARNING, logger="psft"):
        left_out({"epsilon_high": 0.28}, objective="sft")
        left_out(KL_RECIPE, objective="asft")
        left_out(KL_RECIPE, objective="gem")
        left_out(KL_RECIPE, objective="asf")
    assert caplog.messages == [
        "epsilon_high=0.28 of recipe mine belongs to objective psft and is left out for sft.",
        "kl_estimator=k3 of recipe mine belongs to objective sft_kl and is left out for asft.",
        "kl_coef=0.5, kl_direction=reverse of recipe mine is kept for objective asft.",
        "kl_coef=0.5, kl_direction=reverse, kl_estimator=k3 of recipe mine belong to objective sft_kl and are left out "
        "for gem.",
    ]


@pytest.mark.parametrize("objective", ["sft", "dft", "sft_kl", "iw_sft", "gem", "asft", "eaft", "chord_phi", "psft_tv"])
def test_every_objective_can_be_tried_on_the_quick_start(objective):
    """Goes red if the rule is not used by the command: the recipe's epsilon_high would be refused."""
    config = read_request(["quickstart", "--objective", objective, "--max_steps", "8"], command="train").config
    assert config.objective == objective and config.epsilon_high is None and config.max_steps == 8


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("flag", ["epsilon_high=0.3", "gem_beta=1.0", "target_drift=0.1"])
def test_a_flag_without_effect_is_refused(command, flag, capsys):
    """Goes red if the rule covers flags as well, if the recipe's own epsilon_high is blamed with them, or if other
    problems no longer come in the same message.
    """
    assert main([command, "quickstart", "--objective", "dft", f"--{flag}", "--sft_warmup_steps", "-1"]) == 2
    error = capsys.readouterr().err
    assert flag.partition("=")[0] in error and "has no effect for objective 'dft'" in error
    assert "sft_warmup_steps=-1" in error and "epsilon_high=0.28" not in error


def test_a_misspelt_objective_gets_the_nearest_name_and_nothing_else(capsys, caplog):
    """Goes red if the rule meets the unknown name first, or speaks of settings of what does not exist."""
    assert main(["train", "quickstart", "--objective", "dtf"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean 'dft'?" in error and "epsilon_high" not in error + caplog.text


def test_infinite_bounds_are_read_from_yaml_and_flags(tmp_path):
    """Goes red if `.inf` or `inf` stays text."""
    (tmp_path / "mine.yaml").write_text("model_name_or_path: m\ndataset: d.jsonl\nepsilon_high: .inf\n")
    assert read_request([str(tmp_path / "mine.yaml")], command="train").config.epsilon_high == math.inf
    assert read_request(["quickstart", "--epsilon_high", "inf"], command="train").config.epsilon_high == math.inf
    assert read_request(["math-qwen2.5-7b-psft-noclip"], command="train").config.epsilon_high == math.inf


def test_a_recipe_that_contradicts_itself_is_refused(tmp_path):
    """Goes red if settings are left out where no flag asked for another objective."""
    (tmp_path / "mine.yaml").write_text("model_name_or_path: m\ndataset: d.jsonl\nobjective: dft\nepsilon_high: 0.2\n")
    with pytest.raises(RequestError, match="epsilon_high=0.2 has no effect for objective 'dft'"):
        read_request([str(tmp_path / "mine.yaml")], command="train")
