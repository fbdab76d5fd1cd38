"""The row types that travel through this room: what was read, what was understood, what was rejected."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from psft.errors import shown

EXCERPT_CHARS = 400


@dataclass(frozen=True, slots=True)
class Row:
    """One record as read. `value` is what could be read of it; `problem` says why it cannot be used, `detail` where.

    `line` counts from 1: the physical line for .jsonl and .csv, the record's number for every other source.
    """

    file: str
    line: int
    value: Any
    problem: str | None = None
    detail: str = ""

    @property
    def where(self) -> str:
        return f"{shown(self.file)}:{self.line}"


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
        return cls(row.file, row.line, error.reason, error.detail, _excerpt(row.value))

    @property
    def where(self) -> str:
        return f"{shown(self.file)}:{self.line}"

    @property
    def message(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason

    def to_json(self) -> str:
        fields = {"file": self.file, "line": self.line, "reason": self.message, "row": self.row}
        return json.dumps(fields, ensure_ascii=True)


def _excerpt(value: Any) -> str:
    """How a value begins, whatever it is."""
    if isinstance(value, str):
        return value[:EXCERPT_CHARS]
    try:
        return json.dumps(value, ensure_ascii=True, default=str)[:EXCERPT_CHARS]
    except (TypeError, ValueError, RecursionError):  # keys that are no text, endless numbers, endless nesting
        return f"<a {type(value).__name__} that JSON cannot show>"
