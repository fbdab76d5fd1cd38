"""A run's long files as columns: what a reader of many runs needs, and one that must not stop at a damaged line.

`RunFolder.read_rows` refuses a file with a broken line, as training must. Here a broken line is left out and named, since
a report of a crashed run is wanted most when something is broken. A torn last line is left out as everywhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from psft.runs.folder import RunFolder

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

MOST_PROBLEMS = 5
"""Broken lines named one by one; the rest is counted."""


@dataclass
class Rows:
    """The rows of a .jsonl file that can be read. problems: what was left out, with file and line and reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    has_torn_end: bool = False


@dataclass
class Columns:
    """The same as a table, a column a field; a row that lacks a field has null there."""

    table: pa.Table
    problems: list[str] = field(default_factory=list)
    has_torn_end: bool = False

    @property
    def names(self) -> list[str]:
        return self.table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def is_numeric(self, name: str) -> bool:
        """Whether the field is there and holds numbers."""
        import pyarrow as pa

        kind = self.table.schema.field(name).type if name in self.names else pa.null()
        return pa.types.is_integer(kind) or pa.types.is_floating(kind)

    def numbers(self, name: str) -> np.ndarray:
        """(num_rows,) float64; NaN where the value is null, absent or no number."""
        import numpy as np
        import pyarrow as pa

        if not self.is_numeric(name):
            return np.full(len(self), np.nan)
        column = self.table.column(name)
        return column.cast(pa.float64(), safe=False).to_numpy().astype(np.float64)

    def values(self, name: str) -> list[Any]:
        """(num_rows,) as Python has them, None where null or absent."""
        if name not in self.names:
            return [None] * len(self)
        column = self.table.column(name)
        if self.is_numeric(name) and not column.null_count:
            return column.to_numpy().tolist()  # the same values, ten times as fast
        return column.to_pylist()


def read_whole_rows(folder: RunFolder, name: str) -> Rows:
    """Every row of a .jsonl file that is one; empty if there is no file. Never raises for what the file holds."""
    raw, found = _whole_lines(folder, name)
    num_broken = 0
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = None if isinstance(row, dict) else "a row must be a JSON object"
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            row, problem = None, f"not valid JSON ({error})"
        if problem is None:
            found.rows.append(row)
            continue
        num_broken += 1
        if num_broken <= MOST_PROBLEMS:
            found.problems.append(f"{name}:{number}: {problem}; the line is left out.")
    if num_broken > MOST_PROBLEMS:
        found.problems.append(f"{name}: {num_broken - MOST_PROBLEMS} more lines are left out.")
    return found


def read_columns(folder: RunFolder, name: str) -> Columns:
    """A .jsonl file as columns, read many times faster than row by row, to the same values (20,000 rows: 0.1 s)."""
    import pyarrow as pa
    import pyarrow.json

    raw, found = _whole_lines(folder, name)
    if not raw or raw.isspace():
        return Columns(pa.table({}), found.problems, found.has_torn_end)
    if _looks_whole(raw):
        try:
            table = pyarrow.json.read_json(pa.BufferReader(raw))
            if table.num_rows == raw.count(b"\n"):  # two objects on one line pass for two rows there
                return Columns(table, found.problems, found.has_torn_end)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a broken line, or a field of two types
            pass
    slow = read_whole_rows(folder, name)
    table, odd = _table_of(slow.rows)
    return Columns(table, [*slow.problems, *(f"{name}: {text}" for text in odd)], slow.has_torn_end)


def read_parquet(folder: RunFolder, name: str) -> Columns:
    """A .parquet file as columns; empty if there is none. A file that is not whole is a problem, not an error."""
    import pyarrow as pa

    path = folder.path / name
    if not path.exists():
        return Columns(pa.table({}))
    import pyarrow.parquet

    try:
        return Columns(pyarrow.parquet.read_table(path, partitioning=None))
    except (pa.ArrowException, OSError) as error:
        return Columns(pa.table({}), [f"{name}: cannot be read ({str(error).splitlines()[0]}); it is left out."])


def _whole_lines(folder: RunFolder, name: str) -> tuple[bytes, Rows]:
    """The file up to its last newline, and what to say about the rest."""
    try:
        raw = (folder.path / name).read_bytes()
    except FileNotFoundError:
        return b"", Rows()
    except OSError as error:
        return b"", Rows(problems=[f"{name}: cannot be read ({error.strerror or error}); it is left out."])
    whole = raw.rfind(b"\n") + 1
    return raw[:whole], Rows(has_torn_end=bool(raw[whole:].strip()))


def _looks_whole(raw: bytes) -> bool:
    """Whether every line is text that begins an object: pyarrow 26 crashes the process on a bare `null`."""
    import numpy as np

    letters = np.frombuffer(raw, np.uint8)
    begins = letters[np.flatnonzero(letters[:-1] == ord("\n")) + 1]
    try:
        return raw[:1] == b"{" and bool((begins == ord("{")).all()) and (raw.isascii() or bool(raw.decode()))
    except UnicodeDecodeError:
        return False


def _table_of(rows: list[dict[str, Any]]) -> tuple[pa.Table, list[str]]:
    """Rows as a table, and which values did not fit: in a column that holds numbers anything else becomes null."""
    import pyarrow as pa

    columns: dict[str, Any] = {}
    odd = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        is_number = [isinstance(value, int | float) and not isinstance(value, bool) for value in values]
        if any(is_number):
            num_odd = sum(value is not None and not number for value, number in zip(values, is_number, strict=True))
            values = [value if number else None for value, number in zip(values, is_number, strict=True)]
            if num_odd:
                odd.append(f"{num_odd} values of '{name}' are no numbers; they are left out.")
        try:
            columns[name] = pa.array(values, pa.float64() if any(is_number) else None)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            odd.append(f"'{name}' holds values of several kinds; it is left out.")
    return pa.table(columns), odd
