"""Facts about a whole set of tokenised rows, read without making Python objects of them: digest and lengths."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

_ROWS_AT_A_TIME = 4096


def dataset_digest(dataset: Any) -> str:
    """SHA-256 over every row in order: column names, lengths and values.

    Args:
        dataset: any map-style data set of plain values; one of `datasets` is read as Arrow, without Python objects.
    """
    import pyarrow as pa

    digest = hashlib.sha256(f"{len(dataset)} rows\n".encode())
    is_arrow = hasattr(dataset, "with_format") and hasattr(dataset, "column_names")
    blocks = dataset.with_format("arrow") if is_arrow else dataset
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, len(dataset))
        table = blocks[start:stop] if is_arrow else pa.Table.from_pylist([dataset[i] for i in range(start, stop)])
        for name in sorted(table.column_names):
            digest.update(f"{name}\n".encode())
            _add(digest, table[name].combine_chunks())
    return digest.hexdigest()


def row_lengths(dataset: Any) -> list[int]:
    """Tokens of every row of an Arrow table or any map-style data set; one of `datasets` is read as Arrow."""
    import pyarrow as pa

    if isinstance(dataset, pa.Table):
        return _list_lengths(dataset["input_ids"])
    is_arrow = hasattr(dataset, "select_columns") and "input_ids" in dataset.column_names
    if not is_arrow:  # plain rows, or rows that are made as they are read
        return [len(dataset[number]["input_ids"]) for number in range(len(dataset))]
    column = dataset.select_columns("input_ids").with_format("arrow")
    lengths: list[int] = []
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        block = column[start : min(start + _ROWS_AT_A_TIME, len(dataset))]
        lengths += _list_lengths(block["input_ids"])
    return lengths


def _list_lengths(column: Any) -> list[int]:
    import pyarrow.compute as pc

    return pc.list_value_length(column).to_pylist()  # type: ignore[no-any-return]


def _add(digest: Any, array: Any) -> None:
    import pyarrow as pa

    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(np.asarray(array.value_lengths().fill_null(-1), dtype=np.int64).tobytes())
        _add(digest, array.flatten())
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type):
        # int32 and int64 columns of the same numbers are the same data
        wide = np.int64 if not pa.types.is_floating(array.type) else np.float64
        digest.update(np.asarray(array.fill_null(-1 << 40) if array.null_count else array).astype(wide).tobytes())
    else:
        digest.update(repr(array.to_pylist()).encode())
