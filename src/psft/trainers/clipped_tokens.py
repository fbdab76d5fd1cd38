"""Which tokens the clip acts on: counts by token and epoch, with a few places in the text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from psft.data.render import decode
from psft.ops import IGNORE_INDEX
from psft.runs.clipped_tokens import FILE_NAME, read_clipped_tokens, write_clipped_tokens
from psft.runs.rows import ClippedTokenRow
from psft.trainers.transfer import to_device

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer

NUM_CONTEXTS = 3
"""Places kept for each token and epoch."""
_BEFORE, _AFTER = 12, 6  # tokens of a place, before and after the clipped one
_PLACES_A_STEP = 32  # looked at in the first micro-batch of a step; over an epoch every common token gets its places
_OPEN, _CLOSE = "\u27e6", "\u27e7"
_STATE_FILE = f"psft_{FILE_NAME}"


class ClippedTokens:
    """Counts on the device without waiting for it; writes when an epoch, the run or a checkpoint asks.

    add(...) per micro-batch -> step_ends() -> write(...) at the end of an epoch

    Counted are targets of mini-batches 2..K: at the first the ratio is 1 and nothing can be clipped. Counts are over
    all ranks; places are the first rank's.
    """

    def __init__(self, trainer: PSFTTrainer) -> None:
        self.trainer = trainer
        self._tables: dict[int, dict[int, ClippedTokenRow]] = {}  # finished parts: epoch -> token id -> row
        self._counts: Tensor | None = None  # (2, V) int64 of the open part: clipped, seen
        self._epoch = 0
        self._place: dict[str, Tensor] | None = None  # one micro-batch of this step, and what of it was clipped

    def add(self, micro_batch: dict[str, Any], mask: Tensor, clipped: Tensor, epoch: int) -> None:
        """Take in one micro-batch.

        Args:
            micro_batch: input_ids and labels, (B, T), and position_ids where it is padding-free.
            mask, clipped: (B, T - 1) bool, aligned with labels[:, 1:]: counted, and counted without a gradient.
            epoch: 1 is the first pass over the data.
        """
        if epoch != self._epoch:
            self._close_part()
            self._epoch = epoch
        if self._counts is None:
            words = self.trainer.model.get_input_embeddings().weight.shape[0]
            self._counts = torch.zeros(2, words, dtype=torch.int64, device=mask.device)
        labels = to_device(micro_batch["labels"], mask.device)
        targets = labels[:, 1:].clamp(min=0).flatten()  # what is ignored adds 0 to token 0
        self._counts[0].scatter_add_(0, targets, clipped.flatten().long())
        self._counts[1].scatter_add_(0, targets, mask.flatten().long())
        if self._place is None:
            names = ("input_ids", "labels", "position_ids")
            self._place = {name: micro_batch[name] for name in names if name in micro_batch} | {"clipped": clipped}

    def step_ends(self) -> None:
        """Keep places of this step's clipped tokens; called where the step waits for the device anyway."""
        place, self._place = self._place, None
        if place is None or not self.trainer.is_world_process_zero():
            return
        on_cpu = {name: tensor.cpu() for name, tensor in place.items()}
        table = self._tables.setdefault(self._epoch, {})
        for row, column in on_cpu["clipped"].nonzero()[:_PLACES_A_STEP].tolist():
            position = column + 1
            token = int(on_cpu["input_ids"][row, position])
            contexts = self._row(table, token)["contexts"]
            if len(contexts) < NUM_CONTEXTS:
                contexts.append(self._text_around(on_cpu, row, position))

    def rows(self) -> list[ClippedTokenRow]:
        """Everything counted so far, over all ranks; called on every rank. By epoch, the most clipped first."""
        self._close_part()
        rows = [row for table in self._tables.values() for row in table.values() if row["seen"]]
        return sorted(rows, key=lambda row: (row["epoch"], -row["clipped"], row["token_id"]))

    def write(self, folder: Path) -> None:
        """Write clipped_tokens.parquet into a run folder; called on every rank, written by the first."""
        self._write(folder / FILE_NAME)

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs into a checkpoint's folder; called on every rank."""
        self._write(folder / _STATE_FILE)

    def restore(self, folder: Path) -> None:
        """Take up what `save` wrote. The first rank counts on from there, the others from nothing."""
        self._tables, self._counts = {}, None
        if self.trainer.is_world_process_zero():
            for row in read_clipped_tokens(folder / _STATE_FILE):
                self._tables.setdefault(row["epoch"], {})[row["token_id"]] = row

    def _write(self, path: Path) -> None:
        rows = self.rows()
        if self.trainer.is_world_process_zero() and rows:
            write_clipped_tokens(path, rows)

    def _close_part(self) -> None:
        """Add the counts on the devices to the epoch's table."""
        if self._counts is None:
            return
        clipped, seen = self.trainer._reduce(self._counts, "sum").cpu()
        self._counts = None
        if not self.trainer.is_world_process_zero():
            return
        table = self._tables.setdefault(self._epoch, {})
        for token in seen.nonzero()[:, 0].tolist():
            row = self._row(table, token)
            row["clipped"] += int(clipped[token])
            row["seen"] += int(seen[token])

    def _row(self, table: dict[int, ClippedTokenRow], token: int) -> ClippedTokenRow:
        if token not in table:
            table[token] = {
                "epoch": self._epoch, "token_id": token, "token": self._text([token]), "clipped": 0, "seen": 0,
                "contexts": [],
            }  # fmt: skip
        return table[token]

    def _text_around(self, place: dict[str, Tensor], row: int, position: int) -> str:
        """The text of one sequence around a token of it: no padding, and no neighbour of a padding-free row."""
        ids = place["input_ids"][row].tolist()
        begins = place["position_ids"][row].eq(0).nonzero()[:, 0].tolist() if "position_ids" in place else [0]
        first = max((i for i in begins if i <= position), default=0)
        last = min((i for i in begins if i > position), default=len(ids))
        ends = place["labels"][row, position:last].ne(IGNORE_INDEX).nonzero()[:, 0]
        last = position + int(ends[-1]) + 1  # behind the last trained token of the sequence there may be padding
        before, after = ids[max(first, position - _BEFORE) : position], ids[position + 1 : last][:_AFTER]
        return f"{self._text(before)}{_OPEN}{self._text([ids[position]])}{_CLOSE}{self._text(after)}"

    def _text(self, ids: list[int]) -> str:
        tokenizer: Any = self.trainer.processing_class
        return decode(tokenizer, ids)
