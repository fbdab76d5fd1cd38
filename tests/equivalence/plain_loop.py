"""PSFT training in plain PyTorch, row by row: what a run of the trainer is compared with. Imports nothing of psft."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from plain import IGNORE_INDEX, plain_loss
from torch import nn


def train(
    model: nn.Module,
    rows: Sequence[Mapping[str, list[int]]],
    *,
    objective: str,
    settings: Mapping[str, Any],
    train_batch_size: int,
    mini_batch_size: int,
    learning_rate: float,
    num_steps: int,
    order: Sequence[Sequence[int]],
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, float]]:
    """Train `model` in place, at a constant learning rate; returns loss, nll and grad_norm of every optimizer step.

    A window is `train_batch_size / mini_batch_size` steps: its old policy is a copy of the model at its first step.
    The reference is a copy of the model before the first step.

    Args:
        rows: `input_ids` and `labels` of equal length, labels not shifted, IGNORE_INDEX = not counted.
        settings: of the objective, by the names of `plain_loss`.
        order: the row numbers of each optimizer step.
        max_grad_norm: the gradient's norm is brought down to it; `grad_norm` is the norm before that.
        weight_decay: of matrices; vectors (norms, biases) do not decay, as in transformers' Trainer.
    """
    assert train_batch_size % mini_batch_size == 0
    steps_per_window = train_batch_size // mini_batch_size
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8)
    ref_model = copy.deepcopy(model).requires_grad_(False)
    history = []
    for step in range(num_steps):
        if step % steps_per_window == 0:
            old_model = copy.deepcopy(model).requires_grad_(False)
        mini_batch = [rows[number] for number in order[step]]
        assert len(mini_batch) == mini_batch_size
        num_counted = sum(label != IGNORE_INDEX for row in mini_batch for label in row["labels"][1:])
        optimizer.zero_grad()
        loss, nll = 0.0, 0.0
        for row in mini_batch:
            input_ids = torch.tensor([row["input_ids"][:-1]])  # position t predicts label t + 1
            labels = torch.tensor([row["labels"][1:]])
            logits = model(input_ids=input_ids).logits
            row_loss = plain_loss(
                objective,
                logits,
                labels,
                old_logits=old_model(input_ids=input_ids).logits,
                ref_logits=ref_model(input_ids=input_ids).logits,
                normalizer=num_counted,
                **settings,
            )
            row_loss.backward()
            loss += row_loss.item()
            nll += plain_loss("sft", logits.detach(), labels, normalizer=num_counted).item()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
        optimizer.step()
        history.append({"loss": loss, "nll": nll, "grad_norm": grad_norm})
    return history
