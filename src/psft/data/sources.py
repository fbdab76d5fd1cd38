"""Reads demonstrations from wherever they lie; every row keeps its file and its line or record number.

In: a hub id, a .jsonl/.jsonl.gz/.json/.parquet/.csv file, a `save_to_disk` folder, or
`reasoning-gym:gsm_symbolic` (pairs: `reasoning-gym-pairs:gsm_symbolic`).
Out: an iterator of `Row`. A source that cannot be opened, or whose rows cannot be told apart, is a `RequestError`; a
single unreadable record is a `Row` with `problem` set, so that validation can list it with the others. What a file of
each kind holds is read in `psft.data.files`.
"""

from __future__ import annotations

import functools
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from psft.data.demonstrations import PAIRS_PREFIX, PREFIX, demonstrations_version, read_demonstrations, read_pairs
from psft.data.digests import digest_of_dataset, digest_of_file, digest_of_folder, stamp_of
from psft.data.files import FILE_SUFFIXES, one_line, read_file
from psft.data.rows import Row
from psft.errors import RequestError, shown

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


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
    if source.startswith((PREFIX, PAIRS_PREFIX)):
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
                source, lambda: read_file(path), lambda: digest_of_file(path), lambda: stamp_of(path), num_bytes
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
        return read_pairs(source) if source.startswith(PAIRS_PREFIX) else read_demonstrations(source)
    except RequestError:
        raise
    except ValueError as error:  # a size of thousands of digits
        raise RequestError(f"{shown(source)} cannot be read: {one_line(error)}. Give smaller numbers.") from error


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
            f"{shown(path)} cannot be read as a save_to_disk folder: {one_line(error)}. Write it again."
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
            f"config {config_name!r}): {one_line(error)}. Check the name, the split and the network."
        ) from error


def _read_dataset(dataset: Any, file: str) -> Iterator[Row]:
    number = 0
    try:
        for number, value in enumerate(dataset, start=1):
            yield Row(file, number, dict(value))
    except Exception as error:  # a damaged file, text that is not UTF-8, an image that cannot be decoded
        raise RequestError(
            f"{shown(file)}: the record after number {number} cannot be read: {one_line(error)}. Write it again."
        ) from error
