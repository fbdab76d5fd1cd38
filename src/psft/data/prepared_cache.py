"""Prepared data sets kept between runs, each named by a digest of everything its rows depend on.

    CACHE/prepared/KEY.arrow   the rows, an Arrow stream; every process that reads it shares one copy in memory
    CACHE/prepared/KEY.json    what else came of the source, and the size and SHA-256 of the rows
    CACHE/prepared/KEY.lock    held by the process that prepares; the others wait for it, then read

The .json is written last, so an entry without one does not exist. What cannot be trusted is prepared again, with a
warning, never used. Entries that were not used for longest go first once all together take more than `LIMIT`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psft.data.digests import digest_of_file, digest_of_values
from psft.data.encode import EncodedBatch
from psft.data.rows import Rejection
from psft.data.tally import Outcome
from psft.errors import RequestError
from psft.machine import local_rank

logger = logging.getLogger(__name__)

LIMIT = 20 << 30  # bytes of all entries
_SPARE = 1 << 30  # bytes that stay free on the disk
_PATIENCE_S = 1.0  # before a process says that it waits for another
_HEAD_START_S = 3.0  # of a job's first rank on a machine before the others
_COUNTS = [item.name for item in dataclasses.fields(EncodedBatch) if item.name not in ("rows", "rejections")]


class PreparedCache:
    """The entry of one key in `folder`, which need not exist yet."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._rows = folder / f"{key}.arrow"
        self._facts = folder / f"{key}.json"
        self._lock = folder / f"{key}.lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """One process at a time, the others wait: True. False where no lock can be had: entries can still be read."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._lock)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._let_the_first_rank_go()
            try:
                lock.acquire(timeout=_PATIENCE_S)
            except Timeout:
                logger.info("another process prepares the same data; waiting for it.")
                lock.acquire()
        except OSError as error:  # a folder that is read-only, a file system without locks
            logger.info("prepared data are not kept in %s: %s.", self.folder, error.strerror or error)
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _let_the_first_rank_go(self) -> None:
        """Wait a moment for a job's first rank, which shows its progress, to take the lock; it need not."""
        end = time.monotonic() + _HEAD_START_S
        while local_rank() and time.monotonic() < end and not (self._lock.exists() or self._facts.exists()):
            time.sleep(0.02)

    def read(self) -> Outcome | None:
        """The entry, its rows mapped into memory. None: there is none, or, with a warning, none that can be trusted."""
        import pyarrow as pa

        try:
            facts = json.loads(self._facts.read_text(encoding="utf-8"))
            if facts.pop("sha256_of_facts", None) != digest_of_values(facts):
                raise ValueError("it does not match its checksum")
            if digest_of_file(self._rows) != facts["sha256_of_rows"]:
                raise ValueError(f"{self._rows.name} does not match its checksum")
            table = _mapped(self._rows)
            counts = {name: facts["counts"][name] for name in _COUNTS}
            total = EncodedBatch(rows=table, rejections=[Rejection(**row) for row in facts["rejections"]], **counts)
            outcome = Outcome(facts["source"], facts["format"], facts["end_token"], total)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            logger.warning("the prepared data in %s cannot be used and are made again: %s.", self._facts, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(self._facts)  # used now
        return outcome

    def write(self, outcome: Outcome) -> None:
        """Keep what came of a source, whole or not at all; where it cannot be kept, a warning says why.

        The caller holds the lock.
        The rows are then those of the file: memory holds them once, however many processes read them.
        """
        import pyarrow as pa

        table, total = outcome.total.rows, outcome.total
        if table is None:
            return
        aside = self._rows.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            for left in self.folder.glob(f"{self._rows.stem}.*.part"):  # of a process that was killed
                left.unlink(missing_ok=True)
            self._facts.unlink(missing_ok=True)
            self._make_room(table.nbytes)
            with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            facts: dict[str, Any] = {
                "source": outcome.source,
                "format": outcome.format_name,
                "end_token": outcome.end_token,
                "sha256_of_rows": digest_of_file(aside),
                "counts": {name: getattr(total, name) for name in _COUNTS},
                "rejections": [dataclasses.asdict(rejection) for rejection in total.rejections],
            }
            facts["sha256_of_facts"] = digest_of_values(facts)
            aside.replace(self._rows)
            aside.write_text(json.dumps(facts), encoding="utf-8")
            aside.replace(self._facts)
            total.rows = _mapped(self._rows)
        except (OSError, RequestError) as error:
            logger.warning(
                "the prepared data are not kept in %s (%s); the next run prepares them again. Make room, or name "
                "another folder with data_cache_dir.",
                self.folder, error,
            )  # fmt: skip
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the entries unused for longest. Raises OSError if the disk has no room even so."""
        entries = []
        for facts in self.folder.glob("*.json"):
            with contextlib.suppress(OSError):  # another process may remove it, too
                entries.append((facts.stat().st_mtime, facts.with_suffix(".arrow").stat().st_size, facts))
        taken = num_bytes
        for _, size, facts in sorted(entries, reverse=True):
            taken += size
            if taken > LIMIT:
                facts.unlink(missing_ok=True)
                facts.with_suffix(".arrow").unlink(missing_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes + _SPARE:
            raise OSError(f"{num_bytes / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free")


def _mapped(path: Path) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
