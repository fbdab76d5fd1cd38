"""What a backend is asked and what it answers. The rest of evaluation knows no other words about models."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from psft.evaluation.benchmarks import Sampling


@dataclass(frozen=True)
class Request:
    """One answer that is wanted. seed: of its random numbers, 0..2^31 - 1, a function of its key."""

    key: str
    benchmark: str
    item: str
    index: int
    seed: int
    messages: tuple[dict[str, str], ...]
    sampling: Sampling


@dataclass(frozen=True)
class Answer:
    """What came back. finish_reason: `stop` or `length`; num_tokens: generated, the end token too; None = not told."""

    text: str
    finish_reason: str
    num_tokens: int | None


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer. It is reported and asked again next time, never kept as an empty answer."""

    reason: str


Outcome = tuple[Request, Answer | Failure]


@dataclass
class Description:
    """What results record of a backend. settings: what can change an answer; notes: what a reader should know."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Backend(Protocol):
    """Answers requests. Loads nothing before the first `generate` that has something to do."""

    name: str

    @property
    def numerics(self) -> str:
        """Part of a sample's key: what else than model and sampling decides an answer, as `hf/float32`."""

    def describe(self) -> Description:
        """For the results; asked after the work."""

    def generate(self, requests: Sequence[Request], done: Collection[str]) -> Iterator[list[Outcome]]:
        """Answer those requests whose key is not in `done`, some at a time, in any order.

        Args:
            requests: all of one benchmark, also those that are done: who batches does it over all of them, so that a
                resumed evaluation has the batches of an uninterrupted one.
        """

    def close(self) -> None:
        """Give back what is held; called once, also after an error or Ctrl-C."""
