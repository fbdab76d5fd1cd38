"""One stage of a pipeline, and what it may refer to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reference:
    """What an earlier stage leaves: `${STAGE.RESULT}`."""

    stage: str
    result: str

    def __str__(self) -> str:
        return f"${{{self.stage}.{self.result}}}"


@dataclass(frozen=True)
class Stage:
    """One command of a pipeline.

    model: a name as the command takes it, or a reference; None where the recipe or nothing names it. runs: of a report.
    settings: `shared` and the stage's own, without the recipe's. A value may be a reference, or hold some in a list.
    """

    name: str
    command: str
    recipe: str | None = None
    model: str | Reference | None = None
    runs: tuple[str | Reference, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def references(self) -> list[Reference]:
        """Every reference, each once, in the order they stand."""
        return list(dict.fromkeys(_references([self.model, self.runs, self.settings])))


def _references(value: Any) -> Iterator[Reference]:
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, Mapping):
        yield from _references(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)
