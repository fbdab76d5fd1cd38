"""The loss TRL computes under our settings is DAPO's, against equations written out in float64.

DAPO (arXiv:2503.14476), equations 8 and 12: with r = exp(logp - old_logp) and A the advantage of the answer,

    -(1 / N) sum over answers i, tokens t of  min(r A_i, clip(r, 1 - epsilon, 1 + epsilon_high) A_i)

N = all counted tokens: every token weighs the same, whatever the length of its answer.
"""

from __future__ import annotations

import math

import pytest
import torch
from trainers.grpo_runs import config, letters, prompts

EPSILON, EPSILON_HIGH = 0.2, 0.28
LENGTHS = [5, 3, 1, 4, 5, 2, 4, 5]
ADVANTAGES = [1.3, -0.7, 0.4, -1.1, 0.9, 0.0, -0.2, 2.0]
TRUNCATED = [0, 4, 7]


def plain_loss(logps, old, lengths, advantages, normalizer, epsilon=EPSILON, epsilon_high=EPSILON_HIGH):
    """(loss, gradient by logps), token by token, in Python's own numbers."""
    loss, gradient = 0.0, [[0.0] * len(row) for row in logps]
    for i, length in enumerate(lengths):
        for t in range(length):
            ratio, advantage = math.exp(logps[i][t] - old[i][t]), advantages[i]
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon_high)
            loss -= min(ratio * advantage, clipped * advantage) / normalizer
            if ratio * advantage <= clipped * advantage:
                gradient[i][t] = -ratio * advantage / normalizer
    return loss, gradient


@pytest.fixture(scope="module")
def numbers():
    """logps and old_logps (8, 5) in float64: ratios from 0.4 to 2.3, on both sides of both bounds."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(8, 5, generator=generator, dtype=torch.float64) * 3 - 0.1
    logps = old + torch.randn(8, 5, generator=generator, dtype=torch.float64) * 0.35
    for (i, t), ratio in {(2, 0): 1.25, (3, 1): 0.75, (5, 0): 1.4, (6, 0): 0.5}.items():  # A > 0, < 0, 0, < 0
        logps[i, t] = old[i, t] + math.log(ratio)
    return logps, old


@pytest.fixture
def make_trainer(tiny_model, tiny_tokenizer, tmp_path):
    from psft.trainers.grpo_sampling import SamplingTrainer

    def make(**settings):
        args = config(tmp_path, **settings)
        return SamplingTrainer(tiny_model, args, prompts(), reward_funcs=letters, processing_class=tiny_tokenizer)

    return make


def loss_of(trainer, logps, old, mask, advantages, num_items):
    """TRL's loss on fixed numbers, its forward pass replaced by them; and the gradient by logps."""
    leaf = logps.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    rows, width = logps.shape
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": torch.ones(rows, 1, dtype=torch.long), "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
            "completion_ids": torch.ones(rows, width, dtype=torch.long), "completion_mask": mask.long(),
            "advantages": torch.tensor(advantages, dtype=torch.float64), "old_per_token_logps": old,
            "num_items_in_batch": torch.tensor(num_items),
        },
    )  # fmt: skip
    loss.backward()
    return loss.item(), leaf.grad


@pytest.mark.parametrize("truncated", [[], TRUNCATED], ids=["all answers", "truncated ones masked"])
def test_loss_and_gradient_are_dapos(make_trainer, numbers, truncated):
    """Goes red if a bound is the other's, an answer's length weighs, a masked token counts, or min becomes max."""
    logps, old = numbers
    lengths = [0 if i in truncated else n for i, n in enumerate(LENGTHS)]
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    trainer = make_trainer(train_batch_size=2, mini_batch_size=2, mask_truncated_completions=bool(truncated))
    loss, gradient = loss_of(trainer, logps, old, mask, ADVANTAGES, sum(lengths))
    expected, by_hand = plain_loss(logps.tolist(), old.tolist(), lengths, ADVANTAGES, sum(lengths))
    assert loss == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(gradient, torch.tensor(by_hand, dtype=torch.float64), atol=1e-12)
    ratios = (logps - old).exp()[mask]
    assert ((ratios > 1 + EPSILON) & (ratios < 1 + EPSILON_HIGH)).any(), "no token tells the two bounds apart"
    assert (ratios < 1 - EPSILON).any() and (ratios > 1 + EPSILON_HIGH).any()


def test_clipping_is_sided(make_trainer, numbers):
    """Above the upper bound a token gives no gradient where its answer is better than its group, and a full one where
    it is worse; below the lower bound the other way round. Goes red if the advantage's sign is not looked at."""
    trainer = make_trainer(train_batch_size=1, mini_batch_size=1)
    old = torch.zeros(4, 1, dtype=torch.float64)
    logps = torch.tensor([[1.29], [1.29], [0.79], [0.79]], dtype=torch.float64).log()
    _, gradient = loss_of(trainer, logps, old, torch.ones(4, 1), [1.0, -1.0, 1.0, -1.0], 4)
    assert gradient.flatten().tolist() == pytest.approx([0.0, 1.29 / 4, -0.79 / 4, 0.0], abs=1e-12)


def test_passes_of_a_batch_add_up_to_the_mean_over_its_tokens(make_trainer, numbers):
    """4 passes of 2 answers, 1 optimizer step. Goes red if a pass divides by tokens of its own."""
    logps, old = numbers
    mask = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]
    trainer = make_trainer(train_batch_size=2, mini_batch_size=2, per_device_train_batch_size=2)
    assert trainer.args.gradient_accumulation_steps == trainer.args.steps_per_generation == 4
    total, parts = 0.0, []
    for i in range(0, 8, 2):
        part = slice(i, i + 2)
        loss, gradient = loss_of(trainer, logps[part], old[part], mask[part], ADVANTAGES[part], sum(LENGTHS))
        total += loss
        parts.append(gradient)
    expected, by_hand = plain_loss(logps.tolist(), old.tolist(), LENGTHS, ADVANTAGES, sum(LENGTHS))
    assert total == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(torch.cat(parts), torch.tensor(by_hand, dtype=torch.float64), atol=1e-12)


def test_mini_batches_divide_by_the_mean_number_of_tokens(make_trainer, numbers):
    """TRL's way, stated in docs/grpo.md: the 2 updates of a batch share N / 2. Goes red if TRL changes it."""
    logps, old = numbers
    mask = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]
    trainer = make_trainer(train_batch_size=2, mini_batch_size=1)
    assert (trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation) == (1, 2)
    loss, _ = loss_of(trainer, logps[:4], old[:4], mask[:4], ADVANTAGES[:4], sum(LENGTHS))
    expected, _ = plain_loss(logps[:4].tolist(), old[:4].tolist(), LENGTHS[:4], ADVANTAGES[:4], sum(LENGTHS) / 2)
    assert loss == pytest.approx(expected, abs=1e-12)
