"""Which test items the training data hold: by exact text, by normalised text, by 13 words in a row.

exact         the question stands in the training row as it is, as a whole field (spaces at the ends aside)
normalised    the same without case, punctuation, spacing and LaTeX's signs
13-gram       13 words in a row of the question, normalised, stand somewhere in the training row; a question of 8 to
              12 words counts with all of them. Shorter ones ("What is 2 + 3?") are compared as wholes only.

A hit says that the text was there, not that it was learned; a paraphrase or a translation is not found. The 13 words
are those of Brown et al., arXiv:2005.14165, appendix C. Words become 64-bit numbers and sequences sums of them, so the
training file is looked through once, with only the test sets' sequences kept.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psft.data.sources import read_rows
from psft.errors import RequestError, shown
from psft.evaluation.items import Data

NUM_WORDS = 13
LEAST_WORDS = 8
"""Words below which a question is too common a phrase to be looked for inside longer texts."""
_FACTOR = 0x9E3779B97F4A7C15  # odd, so multiplying by it loses nothing modulo 2^64
_KINDS = ("exact", "normalised", "13-gram")

Place = tuple[str, str]
"""Benchmark and item."""


@dataclass
class Overlap:
    """hits: benchmark -> item -> the strongest kind of overlap. num_rows: training rows looked at. num_unreadable: rows
    that could not be read and were left out; nothing is known of them."""

    hits: dict[str, dict[str, str]] = field(default_factory=dict)
    num_rows: int = 0
    num_unreadable: int = 0


def words(text: str) -> list[str]:
    """Letters and digits in runs, without case; everything else separates."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def find_overlap(data: Iterable[Data], source: str) -> Overlap:
    """Look for every item's question in every text of the training data.

    Args:
        source: what `--dataset` of psft train takes (`psft.data.sources.read_rows`).
    Raises:
        RequestError: the source cannot be read, or none of its rows can.
    """
    sets = list(data)
    index = _Index()
    for part in sets:
        for item in part.items:
            index.add((part.benchmark.name, item.id), item.question)
    index.close()
    found = Overlap({part.benchmark.name: {} for part in sets})
    for row in read_rows(source):
        if row.problem is not None:
            found.num_unreadable += 1
            continue
        found.num_rows += 1
        for text in _texts(row.value):
            for (benchmark, name), kind in index.look_up(text):
                before = found.hits[benchmark].get(name)
                if before is None or _KINDS.index(kind) < _KINDS.index(before):
                    found.hits[benchmark][name] = kind
    if not found.num_rows:
        raise RequestError(f"none of the {found.num_unreadable:,} rows of {shown(source)} can be read. Correct it.")
    return found


def _texts(value: Any) -> Iterator[str]:
    """Every text of a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


class _Index:
    """Questions by whole text and by sequences of words."""

    def __init__(self) -> None:
        self._exact: dict[str, list[Place]] = {}
        self._normalised: dict[str, list[Place]] = {}
        self._numbers: dict[str, int] = {}
        self._grams: dict[int, dict[int, list[Place]]] = {}  # length -> hash -> places
        self._sorted: dict[int, np.ndarray] = {}

    def add(self, place: Place, question: str) -> None:
        found = words(question)
        self._exact.setdefault(question.strip(), []).append(place)
        self._normalised.setdefault(" ".join(found), []).append(place)
        if len(found) < LEAST_WORDS:
            return
        for word in found:
            self._numbers.setdefault(word, _number(word))
        length = min(len(found), NUM_WORDS)
        for gram in set(_hashes(self._array(found), length).tolist()):
            self._grams.setdefault(length, {}).setdefault(gram, []).append(place)

    def close(self) -> None:
        """No question comes any more."""
        self._sorted = {length: np.sort(np.fromiter(grams, np.uint64)) for length, grams in self._grams.items()}

    def look_up(self, text: str) -> Iterator[tuple[Place, str]]:
        found = words(text)
        yield from ((place, "exact") for place in self._exact.get(text.strip(), ()))
        yield from ((place, "normalised") for place in self._normalised.get(" ".join(found), ()) if found)
        array = self._array(found)
        for length, grams in self._grams.items():
            if len(found) < length:
                continue
            hashes = _hashes(array, length)
            known = self._sorted[length]
            nearest = known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)]
            for gram in set(hashes[nearest == hashes].tolist()):
                yield from ((place, "13-gram") for place in grams[gram])

    def _array(self, found: list[str]) -> np.ndarray:
        return np.array([self._numbers.get(word, 1) for word in found], dtype=np.uint64)  # 1: a word no question has


def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


def _hashes(numbers: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit number for every run of `length` words; equal runs have equal numbers, others almost surely not."""
    total = np.zeros(len(numbers) - length + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for i in range(length):
            total = total * np.uint64(_FACTOR) + numbers[i : i + len(total)]
    return total
