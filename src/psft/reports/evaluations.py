"""Results files of `psft eval` (MODEL.SUITE.json), read with care: they may be torn, of another program, or hostile.

Of a run they lie under RUN/evaluation. A benchmark of which something cannot be used is left out, and a note says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psft.errors import RequestError, first_line, shown
from psft.evaluation.results_file import SCHEMA, TRUNCATED
from psft.runs.folder import EVALUATION

MOST_FILES = 500
MOST_BYTES = 256 << 20
"""A file above is no results file: MMLU-Pro, the largest set, takes 1 MB."""


@dataclass(frozen=True)
class Measurement:
    """One benchmark of one model: mean score over items in 0..1, its standard error over items.

    benchmark: as the file spells it. items: each item's mean score by id; None where only the mean is known
    (eval.jsonl). data: checksum of the file the items are from. asked: what decides an answer beside the model: prompt,
    sampling, k. step: of training, None = not known. source: what it was read from. remarks: what a reader of the score
    should know.
    """

    benchmark: str
    value: float
    stderr: float | None
    n: int | None
    k: int | None
    step: int | None
    source: str
    items: Mapping[str, float] | None = None
    data: str | None = None
    asked: Any = None
    is_whole: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        return (self.n or 0) * (self.k or 1)


@dataclass(frozen=True)
class Evaluation:
    """One results file. names: what the model is called there. notes: what of it could not be used."""

    source: str
    names: tuple[str, ...]
    step: int | None
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()


def read_evaluation(path: Path, source: str) -> Evaluation | None:
    """What a results file holds; None if it is JSON of another kind.

    Args:
        source: how notes and tables call the file.
    Raises:
        ValueError: it cannot be read, in words.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{source} is larger than results are ({MOST_BYTES >> 20} MiB); it is left out.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        if str(error).startswith(source):
            raise
        raise ValueError(f"{source} is not whole JSON ({shown(first_line(error), 80)}); it is left out.") from error
    if not isinstance(content, dict) or "schema" not in content or not isinstance(content.get("benchmarks"), list):
        return None
    if content["schema"] != SCHEMA:
        raise ValueError(f"{source} has schema {shown(str(content['schema']), 20)}, this psft reads {SCHEMA}.")
    model = _mapping(content.get("model"))
    step = _count(model.get("step"))
    notes: list[str] = []
    found = []
    for entry in content["benchmarks"]:
        try:
            measurement = _measurement(_mapping(entry), step, source)
        except (TypeError, ValueError, OverflowError) as error:
            name = shown(str(_mapping(entry).get("benchmark")), 40)
            notes.append(f"{source}: {name} cannot be used ({shown(first_line(error), 80)}).")
            continue
        if measurement is not None:
            found.append(measurement)
    names = tuple(str(model[key]) for key in ("asked_as", "name") if isinstance(model.get(key), str))
    return Evaluation(source, names, step, tuple(found), tuple(notes))


def evaluations_of(run: Path) -> tuple[list[Evaluation], list[str]]:
    """Every results file under RUN/evaluation in order of names, and what could not be read."""
    folder = run / EVALUATION
    found, notes = [], []
    paths = sorted(folder.rglob("*.json"))[:MOST_FILES] if folder.is_dir() else []
    for path in paths:
        try:
            evaluation = read_evaluation(path, path.relative_to(run).as_posix())
        except ValueError as error:
            notes.append(str(error))
            continue
        if evaluation is not None:
            found.append(evaluation)
            notes += evaluation.notes
    return found, notes


def read_bases(paths: list[str]) -> list[Evaluation]:
    """Results of models before training, as a person names their files: each a file, or a folder of them.

    Raises:
        RequestError: a path that is missing, cannot be read or holds no results; all together.
    """
    found: list[Evaluation] = []
    problems = []
    for text in paths:
        path = Path(text).expanduser()
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        some: list[Evaluation] = []
        for file in files:
            try:
                evaluation = read_evaluation(file, str(file))
            except ValueError as error:
                problems.append(str(error).rstrip("."))
                continue
            some += [evaluation] if evaluation is not None and evaluation.measurements else []
        if not some and not problems:
            problems.append(f"{text} holds no results of psft eval")
        found += some
    if problems:
        raise RequestError(f"--base: {'; '.join(problems)}. Give MODEL.SUITE.json of psft eval, or its folder.")
    return found


def _measurement(entry: Mapping[str, Any], step: int | None, source: str) -> Measurement | None:
    """Raises ValueError or TypeError for what is no number in 0..1, no name, no list. None: nothing was measured."""
    accuracy = entry.get("accuracy")
    if accuracy is None:
        return None
    name, accuracy = entry.get("benchmark"), _mapping(accuracy)
    if not isinstance(name, str):
        raise ValueError("its name is no text")
    stderr = accuracy.get("stderr")
    items = entry.get("items")
    data, k, n = _mapping(entry.get("data")), _count(entry.get("k")), _count(accuracy.get("n"))
    missing = _count(entry.get("missing_samples")) or 0
    return Measurement(
        name,
        _share(accuracy.get("value")),
        None if stderr is None else _share(stderr),
        n,
        k,
        step,
        source,
        items=None if items is None else _item_means(items),
        data=data["sha256"] if isinstance(data.get("sha256"), str) else None,
        asked=[entry.get(key) for key in ("prompt", "sampling", "k")],
        is_whole=not missing and data.get("limit") is None,
        remarks=tuple(_remarks(entry, missing)),
    )


def _remarks(entry: Mapping[str, Any], missing: int) -> list[str]:
    said = []
    data = _mapping(entry.get("data"))
    if (limit := _count(data.get("limit"))) is not None:
        said.append(f"only its first {limit:,} items")
    if missing:
        said.append(f"{missing:,} samples are missing")
    truncated = entry.get("truncation_rate")
    if truncated is not None and _share(truncated) > TRUNCATED:
        said.append(f"{truncated:.0%} of the answers were cut off, so the score may be too low")
    contamination = entry.get("contamination")
    if isinstance(contamination, Mapping) and isinstance(contamination.get("hits"), list) and contamination["hits"]:
        without = _mapping(contamination.get("without_hits")).get("value")
        clean = f", {100 * _share(without):.1f} without them" if without is not None else ""
        said.append(f"{len(contamination['hits']):,} items are in the training data{clean}")
    notes = data.get("notes")
    said += [shown(note, 200).rstrip(".") for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    return said


def _item_means(items: Any) -> dict[str, float]:
    if not isinstance(items, Mapping):
        raise ValueError("its items are no mapping")
    means = {}
    for name, scores in items.items():
        if not isinstance(scores, list) or not scores:
            raise ValueError("an item has no scores")
        means[name] = sum(map(_share, scores)) / len(scores)
    return means


def _share(value: Any) -> float:
    """A number in 0..1. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{shown(repr(value), 40)} is no number from 0 to 1")
    return float(value)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
