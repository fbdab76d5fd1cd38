"""One token after another for a batch of left-padded prompts, by plain calls of a model.

Unlike `generate` it calls whatever it is given: what wraps a model (DDP, FSDP, PEFT, autocast) sees ordinary forward
passes, and nothing of the model, its configuration or generation settings is read or changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def decode(
    forward: Callable[..., Any],
    ids: Tensor,
    mask: Tensor,
    draw: Callable[[Tensor], Tensor],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    is_over: Callable[[bool], bool] = bool,
) -> Tensor:
    """(B, T) token ids that follow the prompts; what comes after a row's first end token has no meaning.

    Args:
        forward: model call with `input_ids`, `attention_mask`, `position_ids`, `past_key_values` and such; gives
            `.logits` and `.past_key_values`. In eval mode, with autocast as wanted.
        ids, mask: (B, width), padding on the left; mask is 1 at the prompt's tokens.
        draw: (B, V) logits -> (B,) the next tokens.
        end_ids: tokens that end a row.
        is_over: given whether this batch is done, whether to stop. Ranks that hold parts of one model have to call it
            equally often: theirs says yes once all are done.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(list(end_ids), device=ids.device)
    has_ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    made: list[Tensor] = []
    cache = None
    while True:
        output = forward(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        tokens = draw(output.logits[:, -1])
        made.append(tokens)
        has_ended |= torch.isin(tokens, ends)
        if len(made) >= max_new_tokens:
            has_ended.fill_(True)
        if is_over(bool(has_ended.all())):
            break
        ids = tokens[:, None]
        positions = positions[:, -1:] + (~has_ended)[:, None]  # a row that has ended goes beyond no last position
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(made, 1)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's, and those of the model's generation settings."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return sorted(i for i in found if i is not None)
