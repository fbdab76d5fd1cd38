"""Reads the rows of one file: JSON Lines (also gzip), JSON, CSV, parquet. Every row keeps its line or record number.

A file that cannot be read as a whole is a `RequestError`; a single unreadable record is a `Row` with `problem` set. A
key given twice is a problem of its row: JSON readers let the last one win, so one of two answers would vanish.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from psft.data.rows import Row
from psft.errors import RequestError, shown

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_CSV_FIELD_LIMIT = 1 << 30  # characters; Python's default of 131072 is shorter than a long reasoning trace
_LINE_LIMIT = 1 << 28  # bytes; a gzip of a few kilobytes can unpack to a line that fills the memory
_OTHER_ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", codecs.BOM_UTF32_BE: "UTF-32"}


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file whose name ends in one of `FILE_SUFFIXES`, in order.

    Raises:
        RequestError: it is empty, damaged, not UTF-8, or cannot be opened.
    """
    name = path.name.lower()
    try:
        with path.open("rb") as file:
            first = file.read(4)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not first:
        raise RequestError(f"{shown(path)} is an empty file. Give a file with at least one demonstration.")
    if not name.endswith((".gz", ".parquet")):
        for mark, encoding in _OTHER_ENCODINGS.items():
            if first.startswith(mark):
                raise RequestError(f"{shown(path)}:1: byte 1 begins {encoding} text. Save the file as UTF-8.")
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _read_json_lines(path)
    if name.endswith(".json"):
        return _read_json(path)
    if name.endswith(".parquet"):
        return _read_parquet(path)
    return _read_csv(path)


def _unreadable(path: Path, error: OSError) -> RequestError:
    return RequestError(f"{shown(path)} cannot be read: {error.strerror or error}. Check the file and its rights.")


class _Twice(dict):
    """A JSON object in which the key `key` was given more than once."""

    key: str = ""


def _loads(text: str) -> tuple[Any, bool]:
    """The value of a JSON text, and whether an object in it is a `_Twice`."""
    found_twice = False

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found_twice
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        found_twice = True
        twice = _Twice(made)
        twice.key = str(_doubled(key for key, _ in pairs))
        return twice

    return json.loads(text, object_pairs_hook=make_object), found_twice


def _doubled(names: Iterable[str]) -> str | None:
    """The first name that came before."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _key_given_twice(value: Any) -> str | None:
    """The first key that stands twice in an object of `value`, however deep."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Twice):
            return item.key
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return None


def _checked_row(path: Path, number: int, value: Any, may_hold_twice: bool) -> Row:
    key = _key_given_twice(value) if may_hold_twice else None
    if key is None:
        return Row(str(path), number, value)
    return Row(str(path), number, value, "a key is given twice", repr(shown(key, 40)))


def _parse_line(path: Path, line: int, raw: bytes) -> Row:
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        return Row(str(path), line, repr(raw[:200]), "not UTF-8 text", _wrong_byte(raw, error.start))
    try:
        value, may_hold_twice = _loads(text)
    except json.JSONDecodeError as error:
        return Row(str(path), line, text, "not JSON", f"{error.msg}, character {error.pos + 1}")
    except RecursionError:
        return Row(str(path), line, text, "not JSON", "nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return Row(str(path), line, text, "not JSON", shown(error, 100))
    return _checked_row(path, line, value, may_hold_twice)


def _wrong_byte(raw: bytes, position: int) -> str:
    return f"byte 0x{raw[position]:02x}, number {position + 1} of the line"


def _read_json_lines(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    line = 0
    try:
        with opener(path, "rb") as lines:
            while raw := lines.readline(_LINE_LIMIT):
                line += 1
                if len(raw) == _LINE_LIMIT:
                    raise RequestError(
                        f"{shown(path)}:{line}: the line is longer than {_LINE_LIMIT >> 20} MiB. Write one row a line."
                    )
                if raw.strip():
                    yield _parse_line(path, line, raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RequestError(
            f"{shown(path)} is a damaged gzip file after line {line} ({one_line(error)}). Fetch or write it again."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_json(path: Path) -> Iterator[Row]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        value, may_hold_twice = _loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.object, error.start) from error
    except (ValueError, RecursionError) as error:
        lines = raw.strip().splitlines()
        if len(lines) > 1 and _parse_line(path, 1, lines[0]).problem is None:  # JSON Lines that are called .json
            yield from _read_json_lines(path)
            return
        what = "nested too deeply" if isinstance(error, RecursionError) else shown(error)
        raise RequestError(f"{shown(path)} is not JSON: {what}. Write one list of objects, or use .jsonl.") from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) == 1 and len(value) == 1:  # {"data": [...]}
            if isinstance(value, _Twice):
                raise RequestError(
                    f"{shown(path)}: the key '{shown(value.key, 40)}' that holds the rows is given twice. Remove one."
                )
            value = lists[0]
        else:  # a single row
            value = [value]
    if not isinstance(value, list):
        raise RequestError(f"{shown(path)} holds a JSON {type(value).__name__}; give a list of objects, one per row.")
    for number, item in enumerate(value, start=1):
        yield _checked_row(path, number, item, may_hold_twice)


def _not_utf8(path: Path, raw: bytes, position: int) -> RequestError:
    start = raw.rfind(b"\n", 0, position) + 1
    line = raw.count(b"\n", 0, position) + 1
    return RequestError(
        f"{shown(path)}:{line}: not UTF-8 text ({_wrong_byte(raw[start:], position - start)}). Save the file as UTF-8."
    )


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    try:
        with path.open(encoding="utf-8-sig", newline="") as text:
            yield from _parse_csv(path, csv.reader(text, strict=True))
    except UnicodeDecodeError:
        raw = path.read_bytes()  # the decoder knows its place in a buffer only
        try:
            raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error.object, error.start) from error
        raise
    except OSError as error:
        raise _unreadable(path, error) from error


def _parse_csv(path: Path, reader: Any) -> Iterator[Row]:
    """Rows under the names of the first record. A record that breaks the rules of quoting is a row with a problem."""
    try:
        names: list[str] = next((record for record in reader if record), [])
    except csv.Error as error:
        raise RequestError(f"{shown(path)}:1: not a readable CSV header: {shown(error)}. Correct it.") from error
    if (name := _doubled(names)) is not None:
        raise RequestError(f"{shown(path)}:1: the header names the column '{shown(name, 40)}' twice. Rename one.")
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):  # everything to the end of the file was read as one cell
                raise RequestError(
                    f"{shown(path)}:{line}: a quote is opened in this row and never closed, so the rest of the file "
                    "is one cell. Close it, or double the quotes inside cells."
                ) from error
            yield Row(str(path), line, None, "broken CSV quoting", shown(error, 100))
            continue
        if not record:
            continue
        value = dict(zip(names, record, strict=False))
        is_ragged = len(record) > len(names)
        yield Row(str(path), line, value, "more values than the header has columns" if is_ragged else None)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if (name := _doubled(table.schema_arrow.names)) is not None:
                raise RequestError(f"{shown(path)} has two columns named '{shown(name, 40)}'. Rename one.")
            number = 0
            for batch in table.iter_batches(batch_size=256):
                yield from _batch_rows(path, batch, number)
                number += batch.num_rows
    except RequestError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise RequestError(
            f"{shown(path)} is not a readable parquet file: {one_line(error)}. Write it again."
        ) from error


def _batch_rows(path: Path, batch: Any, before: int) -> Iterator[Row]:
    """The rows of a batch; if one of them cannot be made into Python values, that row has the problem, not all."""
    try:
        values = batch.to_pylist()
    except Exception:  # text that is not UTF-8, dates out of range, maps and structs with doubled keys, ...
        for offset in range(batch.num_rows):
            number = before + offset + 1
            try:
                yield Row(str(path), number, batch.slice(offset, 1).to_pylist()[0])
            except Exception as error:
                yield Row(str(path), number, None, "a value that cannot be read", one_line(error, 100))
        return
    for offset, value in enumerate(values):
        yield Row(str(path), before + offset + 1, value)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's kind and message in one line of at most `limit` characters."""
    return shown(" ".join(f"{type(error).__name__}: {error}".split()), limit).rstrip(".")
