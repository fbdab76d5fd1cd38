"""The answers to one prompt as a thing that can be kept, moved to another rank and put into another batch.

TRL's batch is a mapping of tensors whose rows are answers, `num_generations` neighbours to a prompt; prompts are padded
on the left, answers on the right. `split_groups` cuts it by prompt, `join_groups` pads groups of several batches alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Group = dict[str, Tensor]
"""Tensors by TRL's names; the first dimension is `num_generations`."""

_PROMPT = ("prompt_ids", "prompt_mask")
_ANSWER = (
    "completion_ids", "completion_mask", "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps",
    "importance_sampling_ratio", "tool_mask",
)  # fmt: skip
_WHOLE = ("advantages",)
_OF_BATCH = ("num_items_in_batch",)
KNOWN = (*_PROMPT, *_ANSWER, *_WHOLE)


def split_groups(batch: Mapping[str, Tensor], group_size: int) -> list[Group]:
    """The groups of a batch, each with memory of its own.

    Raises:
        ValueError: the batch has an entry this module does not know how to pad (images, say).
    """
    unknown = sorted(set(batch) - {*KNOWN, *_OF_BATCH})
    if unknown:
        raise ValueError(f"a batch with {', '.join(unknown)} cannot be cut into groups: psft grpo trains on text alone")
    size = batch["prompt_ids"].shape[0]
    return [
        {name: batch[name][start : start + group_size].clone() for name in KNOWN if name in batch}
        for start in range(0, size, group_size)
    ]


def join_groups(groups: Sequence[Group], pad_token_id: int) -> dict[str, Tensor]:
    """One batch of the groups, in their order, as narrow as the longest prompt and answer allow.

    What is padded: ids with `pad_token_id`, masks and log-probs with 0, `tool_mask` with 1, as TRL does.
    """
    names = [name for name in KNOWN if name in groups[0]]
    joined = {}
    for name in names:
        parts = [group[name] for group in groups]
        if name in _WHOLE:
            joined[name] = torch.cat(parts)
            continue
        is_prompt = name in _PROMPT
        if not is_prompt and all(part.shape[1] == 1 for part in parts) and name == "importance_sampling_ratio":
            joined[name] = torch.cat(parts)  # one number an answer
            continue
        width = max(part.shape[1] for part in parts)
        fill = pad_token_id if name.endswith("_ids") else 1 if name == "tool_mask" else 0
        joined[name] = torch.cat([_padded(part, width, fill, on_left=is_prompt) for part in parts])
    return _narrowed(joined)


def silenced(group: Group) -> Group:
    """The group without a token that counts: it fills a place in a batch and teaches nothing."""
    masks = {name: torch.zeros_like(group[name]) for name in ("completion_mask", "advantages")}
    return {**group, **masks}


def num_counted(batch: Mapping[str, Tensor]) -> Tensor:
    """How many tokens of the answers count, a scalar."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).sum()


def _padded(tensor: Tensor, width: int, fill: int, *, on_left: bool) -> Tensor:
    missing = width - tensor.shape[1]
    if not missing:
        return tensor
    padding = tensor.new_full((tensor.shape[0], missing), fill)
    return torch.cat([padding, tensor] if on_left else [tensor, padding], dim=1)


def _narrowed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without columns that are padding in every row. An answer that is masked out keeps its width of one column."""
    of_prompt = max(int(batch["prompt_mask"].sum(1).max()), 1)
    of_answer = max(int(batch["completion_mask"].sum(1).max()), 1)
    width = batch["completion_ids"].shape[1]
    narrow = {}
    for name, tensor in batch.items():
        if name in _PROMPT:
            tensor = tensor[:, tensor.shape[1] - of_prompt :]
        elif name in _ANSWER and tensor.shape[1] == width and width > 1:
            tensor = tensor[:, :of_answer]
        narrow[name] = tensor.contiguous()
    return narrow
