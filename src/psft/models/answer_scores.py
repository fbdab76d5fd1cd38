"""How likely a model on this machine finds answers, and how undecided it was at their tokens: sums an answer, in nats.

Each answer is one row of a forward pass, batched with others of like length; the LM head is projected chunk by chunk
(`psft.ops.token_statistics`), so that answers of ten thousand tokens need no (tokens x vocabulary) matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psft.models.logits import logit_transform
from psft.ops import token_statistics

_MOST_PADDED_TOKENS = {"cpu": 4096, "accelerator": 32_768}
"""Of one forward pass. Only one layer's hidden states are kept: a 7B model needs about 1 GB beside its weights."""


class AnswerScore(NamedTuple):
    """tokens: of the answer. logp: their summed log-probability; entropy: the model's, summed over them. Nats."""

    tokens: int
    logp: float
    entropy: float


@torch.no_grad()
def score_answers(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, AnswerScore]]:
    """Score answers at temperature 1; gives each one's number in `rows` with its score, in any order.

    Args:
        model: causal language model in eval mode on its device; nothing of it is changed.
        rows: token ids of prompt and answer, neither empty.
    """
    head = model.get_output_embeddings()
    scale, softcap = logit_transform(model)
    device = model.device
    for numbers in _batches(rows, _MOST_PADDED_TOKENS["cpu" if device.type == "cpu" else "accelerator"]):
        ids, mask, starts = _padded([rows[i] for i in numbers], device)
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for row, number in enumerate(numbers):
            length = len(rows[number][1])
            at = slice(starts[row] - 1, starts[row] + length - 1)  # a token is predicted at the place before it
            found = token_statistics(
                hidden[row, at], head.weight, ids[row, starts[row] : starts[row] + length],
                bias=getattr(head, "bias", None), logit_scale=scale, softcap=softcap,
            )  # fmt: skip
            yield number, AnswerScore(length, _sum(found.logps), _sum(found.entropies))


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64 if values.device.type != "mps" else torch.float32))


def _batches(rows: Sequence[tuple[Sequence[int], Sequence[int]]], most: int) -> Iterator[list[int]]:
    """Numbers of rows, the longest first, as many at a time as fit into `most` padded tokens; at least one."""
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    while order:
        count = max(1, most // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def _padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: Any) -> tuple[Tensor, Tensor, list[int]]:
    """(B, T) ids and mask, padding on the right, where no token looks; and where each answer begins."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor([*prompt, *answer])
        mask[row, :length] = 1
    return ids.to(device), mask.to(device), [len(prompt) for prompt, _ in rows]
