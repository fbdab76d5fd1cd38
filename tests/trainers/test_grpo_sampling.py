"""Dynamic sampling inside TRL's trainer, on the tiny model."""

from __future__ import annotations

import logging

import pytest
import torch
from trainers.grpo_runs import config, letters, prompts

from psft.errors import RequestError, RunFailed


@pytest.fixture
def make_trainer(make_tiny_model, tiny_tokenizer, tmp_path):
    """make_trainer(reward, count, **settings) -> SamplingTrainer on a fresh tiny model."""
    from psft.trainers.grpo_sampling import SamplingTrainer

    def make(reward=letters, count=12, **settings):
        return SamplingTrainer(
            make_tiny_model(), config(tmp_path, **settings), prompts(count), reward_funcs=reward,
            processing_class=tiny_tokenizer,
        )  # fmt: skip

    return make


def by_number(alike):
    """A reward of TRL's signature: alike for prompts whose number `alike` accepts, else 1, 0, 1, 0, ..."""

    def reward(completions, number, **_):
        return [1.0 if alike(n) else float(i % 2 == 0) for i, n in enumerate(number)]

    return reward


class Recorded:
    """Follows which batches a trainer trains on."""

    def __init__(self, trainer):
        self.batches = []
        inner = trainer._next_batch

        def next_batch():
            batch = inner()
            self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
            return batch

        trainer._next_batch = next_batch


def test_uniform_groups_are_replaced_and_the_rest_is_trained_on(make_trainer):
    """Odd prompts teach nothing. Goes red if one is trained on, a batch is not full, or a group is not whole."""
    trainer = make_trainer(by_number(lambda n: n % 2), max_steps=3)
    recorded = Recorded(trainer)
    trainer.train()
    assert len(recorded.batches) == 3 and trainer.state.global_step == 3
    assert len(trainer.ledger) == trainer.filled.num_carried_out == len(trainer._groups)
    for batch in recorded.batches:
        assert batch["advantages"].shape == (16,) and (batch["completion_mask"].sum(1) > 0).all()
        groups = batch["advantages"].view(4, 4)
        assert (groups[:, 0] > 0).all() and (groups[:, 1] < 0).all()
        texts = trainer._tokenizer.batch_decode(batch["prompt_ids"])
        assert all(int(text.rsplit("clips? ", 1)[1].split("<")[0]) % 2 == 0 for text in texts)
        assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())
        assert batch["old_per_token_logps"].shape == batch["completion_ids"].shape


def test_without_dynamic_sampling_every_group_is_trained_on(make_trainer):
    trainer = make_trainer(by_number(lambda n: n % 2), max_steps=3, dynamic_sampling=False)
    recorded = Recorded(trainer)
    trainer.train()
    assert trainer.stream.num_taken == 12 and trainer.filled.num_rounds == 1
    assert any((batch["advantages"] == 0).any() for batch in recorded.batches)


def test_old_log_probs_are_those_of_the_policy_that_answered(make_trainer):
    """A carried-over group keeps its own. Goes red if they are those of another row, or of a later policy."""
    trainer = make_trainer(by_number(lambda n: n % 3 == 0), max_steps=1, sampling_batch_size=8)
    trainer.model.train()
    batch = trainer._next_batch()
    assert len(trainer.ledger) >= 1
    carried = {serial: group["old_per_token_logps"].clone() for serial, group in trainer._groups.items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    again = trainer._logps_of(batch)
    mask = batch["completion_mask"].bool()
    assert not torch.allclose(again[mask], batch["old_per_token_logps"][mask])
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.div_(1.1)  # not to the bit what it was before it grew: hence the tolerance
    assert torch.allclose(trainer._logps_of(batch)[mask], batch["old_per_token_logps"][mask], atol=1e-4)
    following = trainer._next_batch()
    flat = following["old_per_token_logps"][following["completion_mask"].bool()]
    for logps in carried.values():
        assert any(torch.isin(value, flat) for value in logps[logps != 0][:1])


def test_a_batch_that_does_not_fill_is_filled_with_silence(make_trainer):
    """Goes red if a filling group has an advantage, or its tokens count in the divisor."""
    trainer = make_trainer(by_number(lambda n: n != 5), count=8, max_steps=1, max_sampling_rounds=2)
    trainer.model.train()
    batch = trainer._next_batch()
    counted = batch["completion_mask"].sum(1) > 0
    assert (
        batch["advantages"].shape == (16,)
        and int(counted.sum()) == 4
        and bool((batch["advantages"][~counted] == 0).all())
    )
    assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())


def test_data_that_teach_nothing_end_the_run_in_words(make_trainer):
    trainer = make_trainer(by_number(lambda n: True), max_sampling_rounds=2)
    with pytest.raises(RunFailed, match="in 2 rounds all 8 prompts .* rewarded alike .mean reward 1"):
        trainer.train()


def test_a_group_whose_reward_fails_is_dropped_and_said(make_trainer, caplog):
    """Prompt 1 fails. Goes red if its group is trained on, or the failure is silent."""

    def reward(completions, number, **_):
        if number[0] == 1:
            raise ValueError("no verdict")
        return [float(i % 2) for i in range(len(number))]

    trainer = make_trainer(reward, count=4, max_steps=2)
    recorded = Recorded(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.rewards.counts["reward"] > 0 and "no verdict" in caplog.text and "clips? 1" in caplog.text
    texts = [text for batch in recorded.batches for text in trainer._tokenizer.batch_decode(batch["prompt_ids"])]
    assert not any("clips? 1<" in text for text in texts)


def test_what_has_to_differ_may_be_one_reward_alone(make_trainer):
    """By the sum every group differs; by `right` alone those of odd prompts do not. Goes red if the sum decides."""

    def right(completions, number, **_):
        return [1.0 if n % 2 else float(i % 2) for i, n in enumerate(number)]

    def place(number, **_):
        return [float(i) for i in range(len(number))]

    settings = {"rewards": {"right": 1.0, "place": 0.01}, "max_steps": 1}
    every = make_trainer([right, place], **settings)
    every.train()
    assert (every.filled.num_rounds, every.filled.num_kept) == (1, 4)
    by_right = make_trainer([right, place], dynamic_sampling_by="right", **settings)
    recorded = Recorded(by_right)
    by_right.train()
    texts = [text for batch in recorded.batches for text in by_right._tokenizer.batch_decode(batch["prompt_ids"])]
    assert all(int(text.rsplit("clips? ", 1)[1].split("<")[0]) % 2 == 0 for text in texts)


@pytest.mark.parametrize(
    ("reward", "count", "message"),
    [
        (letters, 3, "3 prompts, and 4 are sampled"), (None, 8, "rewards is empty"),
        (torch.nn.Linear(1, 1), 8, "reward model"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(make_trainer, reward, count, message):
    with pytest.raises(RequestError, match=message):
        make_trainer(reward, count=count)
