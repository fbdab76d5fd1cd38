"""Reads demonstrations from wherever they lie; every row keeps its file and its line or record number.

In: a hub id, a .jsonl/.jsonl.gz/.json/.parquet/.csv file, a `save_to_disk` folder, or `reasoning-gym:gsm_symbolic`.
Out: an iterator of `Row`. A source that cannot be opened is a `RequestError`; a single unreadable record is a `Row`
with `problem` set, so that validation can list it with the others.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from psft.data.demonstrations import PREFIX, read_demonstrations
from psft.data.rows import Row
from psft.errors import RequestError

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_CSV_FIELD_LIMIT = 1 << 30  # characters; Python's default of 131072 is shorter than a long reasoning trace


def read_rows(
    source: str, *, split: str = "train", config_name: str | None = None, max_rows: int | None = None
) -> Iterator[Row]:
    """Yield the rows of `source` in order, at most `max_rows` of them.

    Raises:
        RequestError: the source is missing, empty, damaged, of an unknown kind, or lacks the split.
    """
    if max_rows is not None and max_rows < 1:
        raise RequestError(f"max_rows is {max_rows}; give 1 or more, or leave it out to use every row.")
    rows = islice(_open_source(source, split, config_name), max_rows)
    first = next(rows, None)
    if first is None:
        raise RequestError(f"{source} is empty: it holds no row. Give a source with at least one demonstration.")
    yield first
    yield from rows


def _open_source(source: str, split: str, config_name: str | None) -> Iterator[Row]:
    if source.startswith(PREFIX):
        return read_demonstrations(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_saved_folder(path, split)
    if path.is_file():
        return _read_file(path)
    looks_like_path = source.lower().endswith(FILE_SUFFIXES) or source.startswith((".", "/", "~"))
    if looks_like_path or not _HUB_ID.fullmatch(source):
        raise RequestError(f"{source} does not exist. Check the path; it is taken from the folder you are in.")
    return _read_hub(source, split, config_name)


def _read_file(path: Path) -> Iterator[Row]:
    name = path.name.lower()
    if not name.endswith(FILE_SUFFIXES):
        raise RequestError(f"{path} is of an unknown kind. Known file kinds: {', '.join(FILE_SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise RequestError(f"{path} is an empty file. Give a file with at least one demonstration.")
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _read_json_lines(path)
    if name.endswith(".json"):
        return _read_json(path)
    if name.endswith(".parquet"):
        return _read_parquet(path)
    return _read_csv(path)


def _parse_line(path: Path, line: int, raw: bytes) -> Row:
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
    except UnicodeDecodeError:
        return Row(str(path), line, repr(raw[:200]), "not UTF-8 text")
    try:
        return Row(str(path), line, json.loads(text))
    except (ValueError, RecursionError):
        return Row(str(path), line, text, "not JSON")


def _read_json_lines(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as lines:
            for line, raw in enumerate(lines, start=1):
                if raw.strip():
                    yield _parse_line(path, line, raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RequestError(f"{path} is a damaged gzip file ({error}). Fetch or write it again.") from error


def _read_json(path: Path) -> Iterator[Row]:
    raw = path.read_bytes()
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        lines = raw.strip().splitlines()
        if len(lines) > 1 and _parse_line(path, 1, lines[0]).problem is None:  # JSON Lines that are called .json
            yield from _read_json_lines(path)
            return
        raise RequestError(f"{path} is not JSON: {error}. Write one list of objects, or use .jsonl.") from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 and len(value) == 1 else [value]  # {"data": [...]}, or a single row
    if not isinstance(value, list):
        raise RequestError(f"{path} holds a JSON {type(value).__name__}; give a list of objects, one per row.")
    for number, item in enumerate(value, start=1):
        yield Row(str(path), number, item)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    try:
        with path.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text)
            _ = reader.fieldnames  # reads the header, so that line_num stands on it
            line = reader.line_num + 1
            for record in reader:
                extra = record.pop(None, None)  # type: ignore[call-overload]
                problem = "more values than the header has columns" if extra is not None else None
                yield Row(str(path), line, record, problem)
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error
    except csv.Error as error:
        raise RequestError(f"{path} is not a readable CSV file: {error}.") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise RequestError(f"{path} is not a readable parquet file: {_one_line(error)}.") from error


def _read_saved_folder(path: Path, split: str) -> Iterator[Row]:
    import datasets

    if not ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        raise RequestError(
            f"{path} is a folder but no data set: neither dataset_dict.json nor state.json is in it. "
            "Give a folder written by datasets' save_to_disk, or one of the files in it."
        )
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds for a damaged folder
        raise RequestError(f"{path} cannot be read as a save_to_disk folder: {_one_line(error)}.") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise RequestError(f"{path} has no split {split!r}; it has {', '.join(map(repr, saved))}.")
        saved = saved[split]
    return _read_dataset(saved, str(path))


def _read_hub(name: str, split: str, config_name: str | None) -> Iterator[Row]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # hub, network, split and config problems come as a dozen exception types
        raise RequestError(
            f"{name} is no local file, and the hub data set cannot be loaded (split {split!r}, "
            f"config {config_name!r}): {_one_line(error)}. Check the name, the split and the network."
        ) from error
    return _read_dataset(dataset, f"{name}[{split}]")


def _read_dataset(dataset: Any, file: str) -> Iterator[Row]:
    for number, value in enumerate(dataset, start=1):
        yield Row(file, number, dict(value))


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:limit].rstrip(".")
