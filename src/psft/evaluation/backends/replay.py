"""Answers from a file: rows with `benchmark`, `item`, `index` (default 0) and `response`, as samples.jsonl has them.

For answers that were made elsewhere, and for tests. `finish_reason` and `num_tokens` are taken over if they are there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from psft.errors import RequestError
from psft.evaluation.backends.base import Answer, Description, Failure, Outcome, Request
from psft.evaluation.items import read_rows
from psft.evaluation.samples import digest

_BLOCK = 64


class ReplayBackend:
    """Reads the file when it is first asked."""

    name = "replay"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[tuple[str, str, int], dict[str, Any]] | None = None

    @property
    def numerics(self) -> str:
        return f"replay/{digest(sorted(map(digest, self._read().values())))[:16]}"

    def describe(self) -> Description:
        return Description(self.name, {"file": self.path.name, "rows": len(self._read())})

    def _read(self) -> dict[tuple[str, str, int], dict[str, Any]]:
        if self._rows is None:
            rows: dict[tuple[str, str, int], dict[str, Any]] = {}
            for number, row in enumerate(read_rows(self.path), start=1):
                if not isinstance(row.get("response"), str) or "benchmark" not in row or "item" not in row:
                    raise RequestError(f"{self.path}: row {number} lacks benchmark, item or response. Correct it.")
                rows.setdefault((str(row["benchmark"]), str(row["item"]), int(row.get("index", 0))), row)
            self._rows = rows
        return self._rows

    def generate(self, requests: Sequence[Request], done: Collection[str]) -> Iterator[list[Outcome]]:
        todo = [request for request in requests if request.key not in done]
        for start in range(0, len(todo), _BLOCK):
            yield [(request, self._answer(request)) for request in todo[start : start + _BLOCK]]

    def _answer(self, request: Request) -> Answer | Failure:
        row = self._read().get((request.benchmark, request.item, request.index))
        if row is None:
            return Failure(f"{self.path.name} has no such answer")
        tokens = row.get("num_tokens")
        return Answer(row["response"], str(row.get("finish_reason", "stop")), None if tokens is None else int(tokens))

    def close(self) -> None:
        """Nothing is held."""
