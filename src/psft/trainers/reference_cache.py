"""Log-probs of the training tokens under a frozen reference: one table, and the file it is kept in between runs.

The file is named by a digest of everything the numbers depend on (weights, data, how they are computed), so a table of
another model or other data is never read by mistake. A file that is torn or damaged is ignored with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from psft import __version__

logger = logging.getLogger(__name__)

SCORING_VERSION = 2
"""Part of every key: raise it when a table would hold other numbers for the same model and data."""


@dataclass(frozen=True)
class LogpTable:
    """Log-probs of the trained tokens of every row, one row after the other.

    values: (num_tokens,) float32 on the CPU, nats. offsets: (num_rows + 1,) int64; row r is values[offsets[r] :
    offsets[r + 1]], in the order of its tokens.
    """

    values: Tensor
    offsets: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def of(self, row_numbers: Sequence[int]) -> Tensor:
        """The values of these rows, joined in the order given."""
        rows = torch.tensor(row_numbers, dtype=torch.long)
        starts, stops = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist()
        if not row_numbers:  # an empty micro-batch, which keeps ranks in step
            return self.values[:0]
        return torch.cat([self.values[start:stop] for start, stop in zip(starts, stops, strict=True)])

    @classmethod
    def gathered(
        cls, rows: Iterable[tuple[int, Tensor]], num_rows: int, total: Callable[[Tensor], Tensor]
    ) -> LogpTable:
        """The whole table on every rank, from each rank's own rows.

        Args:
            rows: (row number, its values) in any order; together the ranks give every row once.
            total: sums a tensor over all ranks. What a rank does not have it gives as zero, so no value is changed.
        """
        mine = dict(rows)
        counts = torch.zeros(num_rows, dtype=torch.long)
        for number, values in mine.items():
            counts[number] = len(values)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), total(counts).cumsum(0)])
        values = torch.zeros(int(offsets[-1]))
        for number, start in zip(mine, offsets[list(mine)].tolist(), strict=True):
            values[start : start + len(mine[number])] = mine[number]
        return cls(total(values), offsets)

    @classmethod
    def broadcast(cls, table: LogpTable | None, num_rows: int, total: Callable[[Tensor], Tensor]) -> LogpTable:
        """The table of the one rank that has it, on every rank."""
        offsets = total(torch.zeros(num_rows + 1, dtype=torch.long) if table is None else table.offsets)
        return cls(total(torch.zeros(int(offsets[-1])) if table is None else table.values), offsets)


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over every column of every row, in order: name, type, shape and values."""
    digest = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            array = np.ascontiguousarray(np.asarray(row[name]))
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.data)
    return digest.hexdigest()


def weights_digest(state: Mapping[str, Any], *, is_needed: bool = True) -> str | None:
    """SHA-256 over every entry of a state dict: name, type, shape and bytes, read in place where they lie on the CPU.

    A tied weight counts under each of its names. Every rank must call it, as sharded tensors are gathered one by one;
    `is_needed` is False where the result is not wanted, and None comes back.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if not is_needed:
            continue
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes_of(value))
    return digest.hexdigest() if is_needed else None


def key_of(**parts: Any) -> str:
    """One name for everything a table depends on, given as digests and plain values."""
    written = json.dumps({"scoring": SCORING_VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(written.encode()).hexdigest()[:32]


def table_path(folder: Path, key: str) -> Path:
    return folder / f"ref_logps-{key}.safetensors"


def read_table(path: Path, *, num_rows: int) -> LogpTable | None:
    """The table of a file, or None where there is none; a file that cannot be trusted is a warning and None."""
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            table = LogpTable(file.get_tensor("values").clone(), file.get_tensor("offsets").clone())
    except (OSError, SafetensorError) as error:
        fault: str | None = f"it cannot be read: {error}"
    else:
        fault = _fault_of(table, metadata, num_rows)
        if fault is None:
            return table
    logger.warning("the cached reference log-probs in %s are ignored (%s) and computed again.", path, fault)
    return None


def write_table(path: Path, table: LogpTable) -> bool:
    """Write the table as a whole or not at all. Whether it could be written; if not, a warning says why."""
    metadata = {
        "psft": __version__,
        "torch": torch.__version__,
        "scoring": str(SCORING_VERSION),
        "rows": str(table.num_rows),
        "tokens": str(len(table.values)),
        "sha256": _checksum(table),
    }
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"values": table.values, "offsets": table.offsets}, temporary, metadata=metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        logger.warning(
            "the reference log-probs cannot be kept in %s (%s); the next run computes them again. Set ref_cache_dir to "
            "a writable folder.",
            path.parent, error,
        )  # fmt: skip
        return False
    return True


def _fault_of(table: LogpTable, metadata: Mapping[str, str], num_rows: int) -> str | None:
    if table.num_rows != num_rows:
        return f"it has {table.num_rows} rows, the training data {num_rows}"
    if table.values.dtype != torch.float32 or int(table.offsets[-1]) != len(table.values):
        return "its values do not fit its rows"
    if metadata.get("sha256") != _checksum(table):
        return "its values do not match their checksum"
    return None


def _checksum(table: LogpTable) -> str:
    digest = hashlib.sha256(_bytes_of(table.offsets))
    digest.update(_bytes_of(table.values))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's memory as it lies there; a copy only where it is not contiguous or not on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
