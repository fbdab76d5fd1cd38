"""The row types that travel through this room: what was read, what was understood, what was rejected."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

EXCERPT_CHARS = 400


@dataclass(frozen=True, slots=True)
class Row:
    """One record as read. `value` is None when it could not be read; `problem` then says why.

    `line` counts from 1: the physical line for .jsonl and .csv, the record's number for every other source.
    """

    file: str
    line: int
    value: Any
    problem: str | None = None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A validated row. Assistant turns from `first_trained` on are trained; earlier ones are prompt.

    Plain text is a conversation without messages: `text` is set, and every token of it is trained.
    """

    messages: tuple[dict[str, str], ...]
    first_trained: int = 0
    text: str | None = None


class RowRejected(Exception):
    """A row cannot be trained on. `reason` is a fixed phrase to count by, `detail` belongs to this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Rejection:
    """A line of `rejected.jsonl`: where the row stands, why it was left out and how it begins."""

    file: str
    line: int
    reason: str
    detail: str
    row: str

    @classmethod
    def of(cls, row: Row, error: RowRejected) -> Rejection:
        value = row.value
        excerpt = value if isinstance(value, str) else json.dumps(value, ensure_ascii=True, default=str)
        return cls(row.file, row.line, error.reason, error.detail, excerpt[:EXCERPT_CHARS])

    @property
    def message(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason

    def to_json(self) -> str:
        fields = {"file": self.file, "line": self.line, "reason": self.message, "row": self.row}
        return json.dumps(fields, ensure_ascii=True)
