"""pipeline.json: what became of each stage. Written whole after every change, so a crash leaves the one before.

{"schema": 1, "pipeline": NAME, "source": FILE, "stages": {STAGE: StageState},
 "generations": {STAGE: 1}, "set_aside": [...]}
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, TypedDict

from psft.errors import RequestError
from psft.runs import RunFolder

FILE = "pipeline.json"
_SCHEMA = 1


class StageState(TypedDict, total=False):
    """One stage. Paths are relative to the pipeline's folder."""

    status: str
    """`running`, `done`, `failed` or `stopped` (by a signal)."""
    command: list[str]
    """The command line, after `psft`."""
    folder: str
    key: str
    parts: dict[str, Any]
    """What the key was made of (`psft.pipelines.keys`)."""
    outputs: dict[str, str]
    """Result -> path."""
    started_at: str
    ended_at: str | None
    seconds: float
    """Of all attempts."""
    attempts: int
    exit_code: int | None
    """Of the last attempt; negative: the signal that killed it."""
    psft: str
    """The version of the last attempt."""


class PipelineState:
    """The state of a pipeline's folder. Changes are written by `save`."""

    def __init__(self, folder: Path, pipeline: str, source: str) -> None:
        self.folder = folder
        self.pipeline, self.source = pipeline, source
        self.stages: dict[str, StageState] = {}
        self.generations: dict[str, int] = {}
        """How often a stage's folder was put aside."""
        self.set_aside: list[dict[str, Any]] = []
        if (folder / FILE).exists():
            self._read()

    def _read(self) -> None:
        content = RunFolder(self.folder).read_json(FILE)
        path = self.folder / FILE
        if content.get("schema") != _SCHEMA or not isinstance(content.get("stages"), dict):
            raise RequestError(f"{path} is not of this version of psft. Choose another --output_dir.")
        if content.get("pipeline") != self.pipeline:
            raise RequestError(
                f"{self.folder} holds the pipeline {content.get('pipeline')}, not {self.pipeline}. Choose another "
                "--output_dir."
            )
        self.stages = content["stages"]
        self.generations = dict(content.get("generations") or {})
        self.set_aside = list(content.get("set_aside") or [])

    def save(self) -> None:
        """Write pipeline.json, whole or not at all."""
        content = {
            "schema": _SCHEMA, "pipeline": self.pipeline, "source": self.source, "stages": self.stages,
            "generations": self.generations, "set_aside": self.set_aside,
        }  # fmt: skip
        RunFolder(self.folder).write_json(FILE, content)


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
