"""The run folder between a request and the first step: looked at early, taken late, and never without a reason."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psft.errors import RequestError
from psft.runs import RunFolder


class FolderClaim:
    """A folder that a run wants. It is claimed once nothing about the request can fail.

        claim = FolderClaim(path, config)      refuses a folder that cannot be written, or that holds another run
        with claim.collecting() as rejected:   rows that cannot be used are written to this path first
            ... data and trainer are made ...
            claim.take(trainer)                now the folder is the run's, and the rejected rows are in it

    Args:
        config: has resume, resume_from_checkpoint, overwrite_output_dir, process_index.
    """

    def __init__(self, path: Path, config: Any) -> None:
        self.folder = RunFolder(path)
        self.config = config
        self.folder.check_writable()
        self.is_resuming = bool(config.resume or config.resume_from_checkpoint) and self.folder.holds_run()
        if self.folder.holds_run() and not config.overwrite_output_dir and not self.is_resuming:
            self.folder.claim(overwrite=False)  # raises: it holds another run
        self._rejected = Path()

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Path]:
        """The path for rejected rows. A request that fails leaves them in the folder, if no run is there."""
        with tempfile.TemporaryDirectory() as temporary:
            self._rejected = Path(temporary) / "rejected.jsonl"
            yield self._rejected

    @contextlib.contextmanager
    def keeping_rejected(self) -> Iterator[None]:
        """Around the preparation of data: where it fails, the rows it could not use are what a person needs to see."""
        try:
            yield
        except RequestError:
            if self._rejected.exists() and not self.folder.holds_run() and self.config.process_index == 0:
                self.folder.claim()
                self._move_rejected()
            raise

    def take(self, trainer: Any) -> None:
        """Claim the folder for the run of `trainer`. Called on every rank."""
        trainer.accelerator.wait_for_everyone()  # a late rank must not take this run's folder for another's
        if trainer.is_world_process_zero() and not self.is_resuming:
            self.folder.claim(overwrite=self.config.overwrite_output_dir)
            if self._rejected.exists():
                self._move_rejected()
        trainer.recorder.is_claimed = True

    def _move_rejected(self) -> None:
        shutil.move(self._rejected, self.folder.path / "rejected.jsonl")
