"""Where a micro-batch's trained tokens are, which sequence each belongs to, and what a loss is divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psft.ops import IGNORE_INDEX

LOSS_AGGREGATIONS = ("token_mean_global", "micro_batch_token_mean")


@dataclass(frozen=True)
class TrainedTokens:
    """The N trained tokens of a micro-batch, row by row.

    Positions are found once, where the labels are (for training on the CPU): on an accelerator `values[mask]` would
    make the host wait, in every forward pass, to be told how many there are.

    positions: (N,) int64, places in labels[:, 1:] read row by row. shape: (B, T - 1), of labels[:, 1:].
    """

    positions: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, labels: Tensor, positions: Tensor | None = None) -> TrainedTokens:
        """Those whose label, (B, T) not shifted, is not IGNORE_INDEX; `positions` where they are known."""
        rows, length = labels.shape
        if positions is None:
            positions = (labels[:, 1:] != IGNORE_INDEX).flatten().nonzero()[:, 0]
        return cls(positions, (rows, max(length - 1, 0)))

    @property
    def mask(self) -> Tensor:
        """(B, T - 1) bool, True = a trained token."""
        return self.placed(torch.ones_like(self.positions, dtype=torch.bool))

    def hidden_of(self, hidden: Tensor) -> Tensor:
        """(N, H): of (B, T, H), the states that predict the tokens, each one place before its token."""
        return hidden.flatten(0, 1).index_select(0, self._before)

    def labels_of(self, labels: Tensor) -> Tensor:
        """(N,): of (B, T) labels, not shifted, the tokens' own."""
        return labels.flatten().index_select(0, self._before + 1)

    def values_of(self, values: Tensor) -> Tensor:
        """(N,): of (B, T - 1), the inverse of `placed`."""
        return values.flatten().index_select(0, self.positions)

    def placed(self, values: Tensor) -> Tensor:
        """(B, T - 1) from (N,): zero elsewhere. The graph is kept, also where there is no token."""
        empty = values.new_zeros(self.shape[0] * self.shape[1])
        return empty.index_copy(0, self.positions, values).view(self.shape)

    @property
    def _before(self) -> Tensor:
        """Places in (B, T), read row by row: each row is one longer than in (B, T - 1)."""
        return self.positions + self.positions // max(self.shape[1], 1)


def hides_right_padding_only(attention_mask: Tensor | None) -> bool:
    """Whether a causal model computes the same without the mask: (B, T), ones and then zeros in every row.

    No token looks at what comes after it, so none sees the padding. Without a mask attention takes its fast causal way,
    and nobody has to ask the device whether the mask holds a zero. A mask on an accelerator is left alone.
    """
    if attention_mask is None or attention_mask.device.type != "cpu" or attention_mask.dim() != 2:
        return False
    return bool(attention_mask[:, :1].all()) and not bool((attention_mask.diff(dim=1) > 0).any())


def borders_of_one_row(num_tokens: int) -> dict[str, Any]:
    """What a model's forward takes as the borders of a micro-batch that is one row, by the names of TRL's collator.

    Without them transformers' flash attention asks the device, in every layer, whether the row is several joined ones.
    """
    borders = torch.tensor([0, num_tokens], dtype=torch.int32)
    lengths = {"max_length_q": num_tokens, "max_length_k": num_tokens}
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, **lengths}


def sequence_ids(micro_batch: dict[str, Any]) -> Tensor:
    """(B, T - 1) int64, aligned with labels[:, 1:]: the number of each target token's sequence within the micro-batch.

    Padded rows are one sequence each. In a padding-free row `position_ids` start again at 0 with every sequence.
    """
    labels = micro_batch["labels"]
    positions = micro_batch.get("position_ids")
    if positions is None or "attention_mask" in micro_batch:
        return torch.arange(len(labels), device=labels.device)[:, None].expand(len(labels), labels.shape[1] - 1)
    starts = (positions == 0).flatten().cumsum(0).view(positions.shape) - 1
    return starts[:, 1:]


def row_sums(values: Tensor, micro_batch: dict[str, Any], *, is_filled_up: bool = False) -> Tensor:
    """(rows,) float64: the sum of (B, T - 1) values over each sequence, a padded row or one of a joined row.

    Args:
        is_filled_up: whether a joined row goes on, with positions of 0, to a multiple of some length. What fills it up
            is no sequence. Finding its end makes the host wait for a device that holds the positions.
    """
    if "attention_mask" in micro_batch or "position_ids" not in micro_batch:
        return values.sum(1, dtype=torch.float64)
    positions = micro_batch["position_ids"][0]
    if is_filled_up:
        later = positions.nonzero()
        positions = positions[: int(later[-1]) + 1 if len(later) else 1]
    num_rows = int((positions == 0).sum())
    rows = sequence_ids(micro_batch)[0].to(values.device).clamp(max=num_rows - 1)
    return values.new_zeros(num_rows, dtype=torch.float64).index_add(0, rows, values[0].to(torch.float64))


def aggregation_normalizer(aggregation: str, mask: Tensor, num_tokens: Tensor, share: float, world_size: int) -> Tensor:
    """What one micro-batch's sum over tokens is divided by.

    token_mean_global: `num_tokens`, all tokens of the optimizer step, so the result does not depend on the cut.
    micro_batch_token_mean: the mean over the micro-batch's own tokens, times its share of the rank's rows, averaged
        over ranks: what verl 0.5 computes (`agg_loss` with its `loss_scale_factor`), and with it the authors' runs.

    Args:
        mask: (B, T) bool, the micro-batch's trained tokens.
        num_tokens: scalar, trained tokens of the step over all ranks.
        share: the micro-batch's rows over those of this rank's part of the step.
    """
    if aggregation == "token_mean_global" or share == 0:  # an empty micro-batch has nothing to average
        return num_tokens
    return mask.sum().clamp(min=1) * world_size / share
