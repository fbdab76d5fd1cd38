"""Whether a model keeps joined rows apart: seen, not taken from a name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from psft.errors import RequestError
from psft.models.varlen import NAME as VARLEN  # the import makes the name known to transformers

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer

logger = logging.getLogger(__name__)

_LENGTH = 8  # tokens of each of the two rows
_MOST_LEAKED = 1e-3  # nats; with the rows apart the difference is exactly 0
_MOST_MOVED = 0.5  # nats; from rounding, where a kernel computes the second row in another way than the first


def check_rows_kept_apart(trainer: PSFTTrainer) -> None:
    """Score one row after two different ones, and before one of them; it must not make a difference.

    Three forward passes of 16 tokens. Sharded models wait for each other in a forward, so every rank calls it. Weights,
    modes and random state stay.

    Raises:
        RequestError: the model's attention (or what else mixes tokens in it) looks across the border, or its positions
            go on in the second row.
    """
    attention = trainer.attention
    if attention in ("sdpa", "eager") and trainer.args.device.type == "cuda":
        logger.warning(
            "padding_free=true with %s computes a whole square of each micro-batch. Load the model with "
            "attn_implementation=%s, which needs nothing installed, or with a flash-attn.",
            attention,
            VARLEN,
        )
    model = trainer.model
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            after_one, after_other = (_logps(trainer, [first, "row"], 1) for first in ("one", "other"))
            before = _logps(trainer, ["row", "one"], 0)
    finally:
        for module, was_training in modes:
            module.training = was_training
    leaked, moved = ((x - after_one).abs().max().item() for x in (after_other, before))
    if leaked <= _MOST_LEAKED and moved <= _MOST_MOVED:
        return
    raise RequestError(
        f"padding_free=true joins rows, and attn_implementation={attention} does not keep them apart in this model: "
        + (
            f"another row in front changes log-probs by {leaked:.2g} nats."
            if not leaked <= _MOST_LEAKED
            else f"log-probs change by {moved:.2g} nats where a row comes second, as if positions went on."
        )
        + f" Use flash_attention_2, {VARLEN}, flex_attention or sdpa, or set padding_free=false."
    )


def _logps(trainer: PSFTTrainer, names: list[str], place: int) -> Tensor:
    """(_LENGTH - 1,) log-probs of the row at `place` among made-up rows of these names."""
    vocabulary = trainer.model.config.get_text_config().vocab_size
    starts = {"row": 1 + 2 * _LENGTH, "one": 1, "other": 1 + _LENGTH}
    rows = [[(starts[name] + i) % vocabulary for i in range(_LENGTH)] for name in names]
    micro_batch = trainer.data_collator([{"input_ids": ids, "labels": ids} for ids in rows])
    begin = place * _LENGTH  # of logps: the target at column c is token c + 1
    return trainer._score(trainer.model, micro_batch).logps[0, begin : begin + _LENGTH - 1].float()
