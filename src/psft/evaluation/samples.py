"""Files of samples and of grades: one JSON row a line, each with a key, only ever appended to, no key twice.

A key is the hash of everything a sample depends on (`sample_key`). So a sample that is there need never be made again,
one made under other settings is never taken for it, and several models or suites may share a file.

What can go wrong: a process killed while writing leaves a torn last line, which is cut off when the file is next opened
for writing; a broken line anywhere else is an error with its number. Two writers at once are refused by a lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from psft.errors import RequestError
from psft.runs.folder import cut_torn_end, to_json

SAMPLES, GRADES = "samples.jsonl", "grades.jsonl"
"""The two files of an evaluation's folder."""


class SampleRow(TypedDict, total=False):
    """One answer of a model, a line of samples.jsonl."""

    key: str
    """`sample_key` of the fields below."""
    model: str
    """The model's identity: hash of its files, or the server's name for it."""
    benchmark: str
    data: str
    """SHA-256 of the benchmark's data."""
    item: str
    index: int
    """Which of the k samples, 0 is the first."""
    prompt: str
    """SHA-256 of the messages."""
    sampling: dict[str, Any]
    """Backend, temperature, top_p, top_k, max_tokens."""
    seed: int
    """Of the evaluation."""
    response: str
    finish_reason: str
    """`stop`: the model ended it; `length`: it ran into the token limit."""
    num_tokens: int | None
    """Generated tokens, the end token among them; null where the backend does not say."""


def digest(value: Any) -> str:
    """SHA-256 in hex of a value as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sample_key(
    *, model: str, benchmark: str, data: str, item: str, prompt: str, sampling: Mapping[str, Any], seed: int, index: int
) -> str:
    """32 hex digits: what the sample depends on, and nothing else (no path, no time, no batch)."""
    fields = {
        "model": model, "benchmark": benchmark, "data": data, "item": item, "prompt": prompt,
        "sampling": dict(sampling), "seed": seed, "index": index,
    }  # fmt: skip
    return digest(fields)[:32]


def seed_of(key: str) -> int:
    """The seed of a sample's random numbers, 0..2^31 - 1: a function of its key, so the order of work is no matter."""
    return int(key[:8], 16) >> 1


class KeyedFile:
    """A .jsonl file whose rows are found by their `key`; rows stay on disk, keys and places in memory.

        with KeyedFile(path) as file:       # locks it, cuts a torn last line, reads the keys
            file.append([{"key": ...}])     # whole lines in one write; a known key is left out
        KeyedFile(path, is_writer=False)    # reads only; a torn last line is left out

    Raises:
        RequestError: another process writes it, a line is broken (its number is named), or it cannot be opened.
    """

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path = path
        self.num_duplicates = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._handle = -1
        try:
            if is_writer:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                self._lock()
                cut_torn_end(path)
            elif path.exists():
                self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            self.close()
            raise RequestError(
                f"{path} cannot be opened: {error.strerror or error}. Choose another --output_dir."
            ) from error
        if self._handle >= 0:
            try:
                self._read_keys()
            except BaseException:
                self.close()
                raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            self._handle = -1
            raise RequestError(
                f"{self.path} is being written by another psft eval. Wait for it, or choose another --output_dir."
            ) from None

    def _read_keys(self) -> None:
        place = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                if line.strip():
                    self._note(line, place, number)
                place += len(line)

    def _note(self, line: bytes, place: int, number: int) -> None:
        try:
            key = json.loads(line)["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"{self.path}:{number}: no row of psft eval ({type(error).__name__}). Remove this line; what it held "
                "is made again."
            ) from error
        if key in self._places:
            self.num_duplicates += 1
        else:
            self._places[str(key)] = (place, len(line))

    def __enter__(self) -> KeyedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file, and its lock, back."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def keys(self) -> set[str]:
        return set(self._places)

    def read(self, key: str) -> dict[str, Any]:
        """The row of a key.

        Raises:
            KeyError: there is none.
        """
        place, length = self._places[key]
        row: dict[str, Any] = json.loads(os.pread(self._handle, length, place))
        return row

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row, in the order of the file."""
        for key in self._places:
            yield self.read(key)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Write the rows as whole lines in one write, past the cache of this process; those of known keys are left out.

        Returns how many were written.

        Raises:
            OSError: a full disk; a line torn by it is cut off when the file is next opened.
        """
        lines: list[bytes] = []
        keys: list[str] = []
        for row in rows:
            key = str(row["key"])
            if key not in self._places and key not in keys:
                text = json.dumps(to_json(row), ensure_ascii=False, allow_nan=False)
                lines.append(text.encode(errors="backslashreplace") + b"\n")  # half a surrogate stays as its escape
                keys.append(key)
        if not lines:
            return 0
        place = os.lseek(self._handle, 0, os.SEEK_END)
        data = memoryview(b"".join(lines))
        while data:
            data = data[os.write(self._handle, data) :]
        for key, line in zip(keys, lines, strict=True):
            self._places[key] = (place, len(line))
            place += len(line)
        return len(lines)
