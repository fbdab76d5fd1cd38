"""Reads demonstrations from wherever they lie; every row keeps its file and its line or record number.

In: a hub id, a .jsonl/.jsonl.gz/.json/.parquet/.csv file, a `save_to_disk` folder, or `reasoning-gym:gsm_symbolic`.
Out: an iterator of `Row`. A source that cannot be opened, or whose rows cannot be told apart, is a `RequestError`; a
single unreadable record is a `Row` with `problem` set, so that validation can list it with the others.

A key given twice is a problem of its row: JSON readers let the last one win, so one of two answers would vanish.
"""

from __future__ import annotations

import codecs
import csv
import functools
import gzip
import json
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from psft.data.demonstrations import PREFIX, demonstrations_version, read_demonstrations
from psft.data.digests import digest_of_dataset, digest_of_file, digest_of_folder, stamp_of
from psft.data.rows import Row
from psft.errors import RequestError, shown

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_CSV_FIELD_LIMIT = 1 << 30  # characters; Python's default of 131072 is shorter than a long reasoning trace
_LINE_LIMIT = 1 << 28  # bytes; a gzip of a few kilobytes can unpack to a line that fills the memory
_OTHER_ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", codecs.BOM_UTF32_BE: "UTF-32"}


def read_rows(
    source: str, *, split: str = "train", config_name: str | None = None, max_rows: int | None = None
) -> Iterator[Row]:
    """Yield the rows of `source` in order, at most `max_rows` of them.

    Raises:
        RequestError: the source is missing, empty, damaged, of an unknown kind, or lacks the split.
    """
    return open_source(source, split=split, config_name=config_name).rows(max_rows)


@dataclass(frozen=True)
class Source:
    """A source whose kind is known, not read yet.

    read: gives its rows. digest: names what it holds: other content, another name. It reads the bytes, not the rows.
    stamp: another value whenever its files were written. num_bytes: of a file; 0 where they are not known beforehand.
    """

    name: str
    read: Callable[[], Iterator[Row]]
    digest: Callable[[], str]
    stamp: Callable[[], object] = lambda: None
    num_bytes: int = 0

    def rows(self, max_rows: int | None = None) -> Iterator[Row]:
        """The rows in order, at most `max_rows` of them. Raises RequestError: see `read_rows`."""
        if max_rows is not None and max_rows < 1:
            raise RequestError(f"max_rows is {max_rows}; give 1 or more, or leave it out to use every row.")
        rows = islice(self.read(), max_rows)
        first = next(rows, None)
        if first is None:
            raise RequestError(
                f"{shown(self.name)} is empty: it holds no row. Give a source with at least one demonstration."
            )
        yield first
        yield from rows


def open_source(source: str, *, split: str = "train", config_name: str | None = None) -> Source:
    """Find out what `source` is. Raises RequestError: nothing of that name, or of an unknown kind."""
    if source.startswith(PREFIX):
        return Source(source, lambda: _generate(source), lambda: demonstrations_version(source))
    found = _find(source)
    if found is not None:
        path, mode, num_bytes = found
        if stat.S_ISDIR(mode):
            _require_saved(path)
            return Source(
                source,
                lambda: _read_saved_folder(path, split),
                lambda: f"{split} of {digest_of_folder(path)}",
                lambda: stamp_of(path),
            )
        if stat.S_ISREG(mode):
            _require_known_kind(path)
            return Source(
                source, lambda: _read_file(path), lambda: digest_of_file(path), lambda: stamp_of(path), num_bytes
            )
        raise RequestError(f"{shown(source)} is neither a file nor a folder. Write the rows to a file and give that.")
    looks_like_path = source.lower().endswith(FILE_SUFFIXES) or source.startswith((".", "/", "~"))
    if looks_like_path or not _HUB_ID.fullmatch(source):
        raise RequestError(f"{shown(source)} does not exist. Check the path; it is taken from the folder you are in.")
    loaded = functools.cache(lambda: _load_hub(source, split, config_name))
    return Source(
        source,
        lambda: _read_dataset(loaded(), f"{source}[{split}]"),
        lambda: f"{split} of {digest_of_dataset(loaded())}",
    )


def _generate(source: str) -> Iterator[Row]:
    try:
        return read_demonstrations(source)
    except RequestError:
        raise
    except ValueError as error:  # a size of thousands of digits
        raise RequestError(f"{shown(source)} cannot be read: {_one_line(error)}. Give smaller numbers.") from error


def _find(source: str) -> tuple[Path, int, int] | None:
    """The path, what kind of thing is there (st_mode) and its bytes, or None if nothing is."""
    try:
        path = Path(source).expanduser()
        found = path.stat()
        return path, found.st_mode, found.st_size
    except (FileNotFoundError, NotADirectoryError, ValueError, RuntimeError):  # ...; NUL in the name; no such ~user
        return None
    except OSError as error:
        raise RequestError(
            f"{shown(source)} cannot be opened: {error.strerror}. Check the path and its rights."
        ) from error


def _require_known_kind(path: Path) -> None:
    if not path.name.lower().endswith(FILE_SUFFIXES):
        raise RequestError(f"{shown(path)} is of an unknown kind. Known file kinds: {', '.join(FILE_SUFFIXES)}.")


def _read_file(path: Path) -> Iterator[Row]:
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
            f"{shown(path)} is a damaged gzip file after line {line} ({_one_line(error)}). Fetch or write it again."
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
            f"{shown(path)} is not a readable parquet file: {_one_line(error)}. Write it again."
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
                yield Row(str(path), number, None, "a value that cannot be read", _one_line(error, 100))
        return
    for offset, value in enumerate(values):
        yield Row(str(path), before + offset + 1, value)


def _require_saved(path: Path) -> None:
    if not ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        raise RequestError(
            f"{shown(path)} is a folder but no data set: neither dataset_dict.json nor state.json is in it. "
            "Give a folder written by datasets' save_to_disk, or one of the files in it."
        )


def _read_saved_folder(path: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds for a damaged folder
        raise RequestError(
            f"{shown(path)} cannot be read as a save_to_disk folder: {_one_line(error)}. Write it again."
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise RequestError(
                f"{shown(path)} has no split {split!r}; it has {', '.join(map(repr, saved))}. Name one of them with "
                "dataset_split, for held-out data with eval_split."
            )
        saved = saved[split]
    return _read_dataset(saved, str(path))


def _load_hub(name: str, split: str, config_name: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # hub, network, split and config problems come as a dozen exception types
        raise RequestError(
            f"{shown(name)} is no local file, and the hub data set cannot be loaded (split {split!r}, "
            f"config {config_name!r}): {_one_line(error)}. Check the name, the split and the network."
        ) from error


def _read_dataset(dataset: Any, file: str) -> Iterator[Row]:
    number = 0
    try:
        for number, value in enumerate(dataset, start=1):
            yield Row(file, number, dict(value))
    except Exception as error:  # a damaged file, text that is not UTF-8, an image that cannot be decoded
        raise RequestError(
            f"{shown(file)}: the record after number {number} cannot be read: {_one_line(error)}. Write it again."
        ) from error


def _one_line(error: BaseException, limit: int = 300) -> str:
    return shown(" ".join(f"{type(error).__name__}: {error}".split()), limit).rstrip(".")
