"""Reference log-probs of the whole training set: the data's own, those of an earlier run, or computed now."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from psft.data.microbatch import ROW_NUMBER, ROW_NUMBERS, MiniBatchCollator, NumberedRows, cut_by_tokens
from psft.errors import RequestError
from psft.machine import cache_folder
from psft.ops.precision import matmul_precision
from psft.trainers.reference_cache import (
    LogpTable,
    key_of,
    read_table,
    rows_digest,
    table_path,
    weights_digest,
    write_table,
)

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer
    from psft.trainers.reference import FrozenReference

logger = logging.getLogger(__name__)

COLUMN = "ref_logps"  # of the training data: a row's own reference log-probs, one for each trained token
_ROWS_AT_A_TIME = 512


def table_from_column(trainer: PSFTTrainer) -> LogpTable:
    """The data's own reference log-probs. Raises RequestError: a row's number of them is not that of its tokens."""
    rows = []
    for number, row in enumerate(_rows(trainer)):
        values = torch.as_tensor(trainer.train_dataset[number][COLUMN], dtype=torch.float32)
        num_tokens = int((trainer.data_collator([row])["labels"][:, 1:] != -100).sum())
        if values.shape != (num_tokens,):
            raise RequestError(
                f"row {number} of train_dataset has {COLUMN} of shape {tuple(values.shape)} for {num_tokens} trained "
                "tokens. Give one log-prob for every label that is not -100 (a sequence's first token has none), or "
                "remove the column."
            )
        rows.append((number, values))
    return LogpTable.gathered(rows, len(rows), lambda tensor: tensor)


def table_from_cache_or_model(reference: FrozenReference) -> LogpTable:
    """Every trained token of the training set under the reference, on every rank. Only the first rank uses files."""
    started = time.monotonic()
    trainer = reference.trainer
    num_rows = len(trainer.train_dataset)

    def total(tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        if trainer.args.world_size == 1:
            return tensor
        summed: Any = trainer.accelerator.reduce(tensor.to(trainer.args.device), "sum")
        return summed.cpu()

    path, lengths = _cache_path_and_lengths(reference)
    table = None if path is None else read_table(path, num_rows=num_rows)
    if total(torch.tensor(int(table is not None))).item():
        table, how = LogpTable.broadcast(table, num_rows, total), f"read from {path}"
    else:
        lengths = total(torch.zeros(num_rows, dtype=torch.long) if lengths is None else lengths)
        table, how = LogpTable.gathered(_scored_rows(reference, lengths.tolist()), num_rows, total), "computed"
        if path is not None and write_table(path, table):
            how = f"computed and kept in {path}"
    if trainer.is_world_process_zero():
        seconds = time.monotonic() - started
        logger.info("reference log-probs %s: %d rows, %d tokens, %.1f s.", how, num_rows, len(table.values), seconds)
    return table


def column_names(dataset: Any) -> list[str]:
    """Of a data set that may be None or a plain sequence of rows."""
    if dataset is None or not len(dataset):
        return []
    return list(getattr(dataset, "column_names", None) or dataset[0])


def _cache_path_and_lengths(reference: FrozenReference) -> tuple[Path | None, Tensor | None]:
    """On the first rank the file for this model and data, and the tokens of each row; on the others nothing."""
    trainer = reference.trainer
    is_first = trainer.is_world_process_zero()
    state = reference.state()
    weights = None if state is None else weights_digest(state, is_needed=is_first)
    if not is_first:
        return None, None
    # TRL's collator is a fixed function of a row; what any other makes of it is part of what the model sees.
    is_plain = type(trainer.data_collator) is DataCollatorForLanguageModeling
    lengths = []

    def rows_as_seen() -> Iterator[dict[str, Any]]:
        for row in _rows(trainer):
            lengths.append(len(row["input_ids"]))
            yield row if is_plain else trainer.data_collator([row])

    rows = rows_digest(rows_as_seen())
    if weights is None:
        logger.warning("the reference log-probs are not kept in a file: no rank has the reference's weights whole.")
        return None, torch.tensor(lengths)
    config = reference.config
    key = key_of(
        weights=weights,
        rows=rows,
        config={name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "use_cache")},
        attention=config._attn_implementation,
        mixed_precision=trainer.accelerator.mixed_precision,
        matmul_precision=matmul_precision(),
        head_kernel=trainer.head_kernel,
    )
    named = trainer.args.ref_cache_dir
    folder = cache_folder() / "ref_logps" if named is None else Path(named).expanduser()
    return table_path(folder, key), torch.tensor(lengths)


def _rows(trainer: PSFTTrainer) -> Iterator[dict[str, Any]]:
    """Every row of the training set as the collator gets it."""
    dataset = _numbered(trainer)
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        (rows,) = dataset.__getitems__([list(range(start, min(start + _ROWS_AT_A_TIME, len(dataset))))])
        for row in rows:
            yield {name: value for name, value in row.items() if name != ROW_NUMBER}


def _numbered(trainer: PSFTTrainer) -> NumberedRows:
    dataset: Any = trainer._remove_unused_columns(trainer.train_dataset, description="training")
    return NumberedRows(dataset)


def _scored_rows(reference: FrozenReference, lengths: list[int]) -> list[tuple[int, Tensor]]:
    """(row number, log-probs of its trained tokens) for this rank's share, in micro-batches of rows of like length.

    Every rank runs the same number of forwards, as sharded models need; the surplus ones are dropped.
    """
    trainer, args = reference.trainer, reference.trainer.args
    if reference.is_trained_model and trainer.state.global_step > 0:
        raise RequestError(
            f"the policy has made {trainer.state.global_step} updates and can no longer be its own reference. Name the "
            "model it started from with ref_model_name_or_path."
        )
    reference.place()
    cut = trainer.micro_batch_cap.cut()
    collate, dataset = MiniBatchCollator(trainer.data_collator), _numbered(trainer)
    groups = cut_by_tokens(lengths, cut)
    shares = range(args.process_index, len(groups) + args.process_index, args.world_size)
    is_quiet = bool(args.disable_tqdm) or not trainer.is_world_process_zero()
    rows: list[tuple[int, Tensor]] = []
    with reference.frozen() as model:
        for i in tqdm(shares, desc="reference log-probs", delay=2, leave=False, disable=is_quiet):
            (micro_batch,) = collate(dataset.__getitems__([groups[min(i, len(groups) - 1)]]))["micro_batches"]
            scored = trainer._score(model, micro_batch, score_tokens="logps")
            if i >= len(groups):
                continue
            numbers = micro_batch[ROW_NUMBERS]
            values, mask = scored.logps[scored.mask].float().cpu(), scored.mask.cpu()
            if not cut.is_padded:  # one row of all sequences; the mask lacks the very first token
                widths = [lengths[number] for number in numbers]
                widths[0] -= 1
                mask = nn.utils.rnn.pad_sequence(mask[0, : sum(widths)].split(widths), batch_first=True)
            rows += zip(numbers, values.split(mask.sum(1).tolist()), strict=True)
    return rows
