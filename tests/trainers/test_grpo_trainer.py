"""The GRPO stage as a run: what it records, and that it goes on to the same numbers from wherever it stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from trainers.grpo_runs import config, letters, prompts
from transformers import TrainerCallback

from psft.errors import RequestError


@pytest.fixture
def make_trainer(make_tiny_model, tiny_tokenizer, tmp_path):
    """make_trainer(folder, **settings) -> GRPOStageTrainer on a fresh tiny model: 2 updates to a batch."""
    from psft.trainers import GRPOStageTrainer

    def make(folder="run", reward=letters, callbacks=None, peft_config=None, **settings):
        settings = {"mini_batch_size": 2, "max_steps": 6, "probe_every": 0, "lr_scheduler_type": "constant", **settings}
        return GRPOStageTrainer(
            make_tiny_model(), config(tmp_path / folder, **settings), prompts(12), reward_funcs=reward,
            processing_class=tiny_tokenizer, callbacks=callbacks, peft_config=peft_config,
        )  # fmt: skip

    return make


def rows_of(path: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def numbers_of(path: Path) -> list[dict]:
    """metrics.jsonl without what depends on the machine's speed and memory."""
    timed = ("tokens_per_second", "peak_memory_bytes")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows_of(path)]


class Stop(TrainerCallback):
    """Sends this process a signal at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_records_what_reinforcement_learning_is_watched_by(make_trainer, tmp_path):
    """Goes red if a field is missing, is another row's, or is a mean over other answers."""
    trainer = make_trainer(kl_to_start=True, probe_every=3, probe_max_new_tokens=4)
    trainer.train()
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [(row["window"], row["mini_batch"]) for row in rows] == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    every = "entropy clip_fraction clip_fraction_low clip_fraction_high loss grad_norm learning_rate tokens epoch"
    of_batch = (
        "reward_mean reward_std kept_group_share sampling_rounds groups_sampled groups_trained groups_carried_over"
    )
    of_batch += (
        " reward_failures completion_length_mean completion_length_max truncated_share kl_start_k3 reward_letters"
    )
    for row in rows:
        assert set(every.split()) <= set(row)
        assert (set(of_batch.split()) <= set(row)) == (row["mini_batch"] == 1)
    first = rows[0]
    assert 0 <= first["reward_mean"] <= 1 and first["groups_trained"] == 4 and first["kl_start_k3"] == 0.0
    assert first["clip_fraction"] == 0.0 and rows[-2]["kl_start_k3"] > 0
    assert rows[0]["tokens"] + rows[1]["tokens"] <= 16 * 6 and rows[0]["tokens"] == rows[0]["completion_length_max"] * 8
    shown = rows_of(tmp_path / "run", "answers.jsonl")
    assert [row["step"] for row in shown] == [1, 3, 5] and len(shown[0]["answers"]) == 4
    assert all(a["reward"] == float("e" in a["response"]) for row in shown for a in row["answers"])
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["stage"] == "grpo" and info["objective"]["settings"]["rewards"] == {"letters": 1.0}
    probed = rows_of(tmp_path / "run", "probe.jsonl")
    assert {row["step"] for row in probed} == {0, 3, 6} and probed[0]["drift_nats_per_token"] == 0.0


@pytest.mark.parametrize("stop", [2, 3], ids=["inside a batch", "between two"])
def test_a_stopped_run_goes_on_to_the_same_numbers(make_trainer, tmp_path, stop):
    """SIGTERM in step `stop` + 1. Goes red if an answer is sampled again, a carried-over group or the random state is
    lost, a prompt comes twice, or sampling begins anew because other data would be allowed."""
    whole = make_trainer("whole", sampling_batch_size=8)
    whole.train()
    cut = make_trainer("cut", sampling_batch_size=8, callbacks=[Stop(stop)], save_strategy="steps", save_steps=100)
    cut.train()
    assert cut.state.global_step == stop + 1 and cut.stop_signal.exit_code == 143
    more = {"save_strategy": "steps", "save_steps": 100, "resume": True, "allow_changed": ["data"]}
    onward = make_trainer("cut", sampling_batch_size=8, **more)
    onward.train()
    assert numbers_of(tmp_path / "cut") == numbers_of(tmp_path / "whole")
    assert rows_of(tmp_path / "cut", "answers.jsonl") == rows_of(tmp_path / "whole", "answers.jsonl")
    for (name, one), other in zip(onward.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert onward.stream.num_taken == whole.stream.num_taken


def test_another_run_is_not_taken_up(make_trainer, tmp_path):
    """Goes red if other rewards or batch sizes go on as if nothing were."""
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(RequestError, match="objective"):
        make_trainer(resume=True, temperature=0.9).train()
    with pytest.raises(RequestError, match="batch_sizes"):
        make_trainer(resume=True, mini_batch_size=4).train()


def test_failed_rewards_are_in_the_run_folder(make_trainer, tmp_path):
    def sometimes(completions, number, **_):
        return [float("nan") if n == 1 and i == 0 else float(i % 2) for i, n in enumerate(number)]

    trainer = make_trainer(reward=sometimes, max_steps=6)
    trainer.train()
    failures = rows_of(tmp_path / "run", "reward_failures.jsonl")
    assert failures and all(row["prompt"].endswith("? 1") and row["reward"] == "sometimes" for row in failures)
    counted = sum(row.get("reward_failures", 0) for row in rows_of(tmp_path / "run"))
    assert counted == len(failures) == trainer.rewards.counts["sometimes"]


def test_an_adapter_is_measured_against_the_model_without_it(make_trainer, tmp_path):
    """Goes red if the base weights move, a copy is kept although none is needed, or KL is not 0 at first."""
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(peft_config=lora, kl_to_start=True, learning_rate=1e-2)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "lora" not in name}
    trainer.train()
    assert trainer._start is None
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)
    found = [row["kl_start_k3"] for row in rows_of(tmp_path / "run") if "kl_start_k3" in row]
    assert abs(found[0]) < 1e-6 < found[-1]
