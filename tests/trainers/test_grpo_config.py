"""Batches stated in prompts and what TRL makes of them; settings that cannot be used."""

from __future__ import annotations

import pytest
from trainers.grpo_runs import config

from psft.errors import RequestError
from psft.trainers.grpo_config import GRPOStageConfig
from psft.trainers.grpo_sampling import require_known_trl


def test_the_defaults_are_those_of_table_7_and_dapo(tmp_path):
    """Goes red if a default of TRL's, or of ours, leaves the paper."""
    args = GRPOStageConfig(output_dir=str(tmp_path), report_to="none")
    assert (args.epsilon, args.epsilon_high, args.beta, args.loss_type) == (0.2, 0.28, 0.0, "dapo")
    assert (args.num_generations, args.temperature, args.learning_rate) == (8, 1.0, 1e-6)
    assert (args.train_batch_size, args.mini_batch_size) == (256, 32)
    assert (args.max_prompt_length, args.max_completion_length, args.overlong_buffer) == (2048, 10240, 2048)
    assert args.scale_rewards == "group" and args.dynamic_sampling and args.on_reward_failure == "drop_group"
    assert not (args.mask_truncated_completions or args.vllm_importance_sampling_correction)
    assert args.disable_dropout


@pytest.mark.parametrize(
    ("prompts", "mini", "answers", "ranks", "per_device", "expected"),
    [
        (256, 32, 8, 1, 8, (8, 32, 256)),  # Table 7 on one device: 8 updates of 256 answers
        (256, 32, 8, 8, 8, (8, 4, 32)),
        (256, 32, 8, 8, 16, (16, 2, 16)),
        (256, 256, 8, 4, 8, (8, 64, 64)),  # one update a batch
        (4, 2, 3, 1, 8, (6, 1, 2)),  # 8 does not divide 6 answers: 6 does
        (6, 3, 4, 2, 8, (6, 1, 2)),  # a rank's share of an update need not be whole prompts
    ],
)
def test_prompts_become_trls_answers(tmp_path, monkeypatch, prompts, mini, answers, ranks, per_device, expected):
    """(per device, accumulation, passes of a batch). Goes red if sizes count answers, or ranks are forgotten."""
    from psft.trainers import grpo_config

    monkeypatch.setattr(grpo_config, "_num_ranks", lambda: ranks)
    monkeypatch.setattr(GRPOStageConfig, "world_size", property(lambda self: ranks))
    args = config(
        tmp_path, train_batch_size=prompts, mini_batch_size=mini, num_generations=answers,
        per_device_train_batch_size=per_device,
    )  # fmt: skip
    found = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation)
    assert found == expected
    assert args.generation_batch_size == prompts * answers
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    assert (
        per_update == mini * answers
        and args.steps_per_generation // args.gradient_accumulation_steps == prompts // mini
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 6, "mini_batch_size": 4}, "multiple of mini_batch_size"),
        ({"num_generations": 1}, "2 answers or more"),
        ({"gradient_accumulation_steps": 4}, "follow from train_batch_size"),
        ({"generation_batch_size": 4}, "follow from train_batch_size"),
        ({"per_device_train_batch_size": 5}, "must divide 16"),
        ({"overlong_buffer": 7}, "between 0 and max_completion_length=6"),
        ({"on_reward_failure": "drop_group", "dynamic_sampling": False}, "needs dynamic_sampling"),
        ({"rewards": {"choice": 1.0}, "dynamic_sampling_by": "math"}, "one of total, choice"),
        ({"sampling_batch_size": 1, "max_sampling_rounds": 3}, "can never fill"),
        ({"scale_rewards": "batch"}, "Use group or none"),
        ({"reward_weights": [1.0]}, "belong to the rewards"),
        ({"loss_type": "dapo", "lr_scheduler_type": "linears"}, "linears"),
        ({"resume": True, "overwrite_output_dir": True}, "Give one"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_words(tmp_path, settings, message):
    with pytest.raises(RequestError, match=message):
        config(tmp_path, **settings)


def test_problems_come_together(tmp_path):
    with pytest.raises(RequestError, match="must be 1 or more.*belong to the rewards"):
        config(tmp_path, max_sampling_rounds=0, reward_weights=[1.0])


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0"])
def test_another_trl_is_refused(version):
    """Goes red if a version whose methods may be others passes in silence."""
    with pytest.raises(RequestError, match=f"made for TRL 1.16.*this is TRL {version}"):
        require_known_trl(version)
    require_known_trl("1.16.3")
