"""clipped_tokens.parquet: how often each token of the vocabulary was clipped, by epoch. Written whole, no torch."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from psft.errors import RequestError
from psft.runs.folder import replace_file
from psft.runs.rows import ClippedTokenRow

FILE_NAME = "clipped_tokens.parquet"
_FIELDS = ("epoch", "token_id", "token", "clipped", "seen", "contexts")


def write_clipped_tokens(path: Path, rows: Iterable[ClippedTokenRow]) -> None:
    """Write the rows to a file that is never seen half written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, text = pa.int64(), pa.string()
    schema = pa.schema(zip(_FIELDS, (number, number, text, number, number, pa.list_(text)), strict=True))
    table: list[Any] = list(rows)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table, schema=schema), buffer)
    replace_file(path, buffer.getvalue())


def read_clipped_tokens(path: Path) -> list[ClippedTokenRow]:
    """What `write_clipped_tokens` wrote; nothing if there is no such file.

    Raises:
        RequestError: the file is no parquet file, or lacks a column.
    """
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    if not path.exists():
        return []
    try:
        rows: list[Any] = pq.read_table(path, columns=list(_FIELDS)).to_pylist()
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{path} cannot be read: {reason}. Restore it, or remove it to go on without.") from error
    return rows
