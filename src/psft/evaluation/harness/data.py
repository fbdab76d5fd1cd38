"""Local copies of benchmark data as rows in the form that lm-eval's tasks take from the hub.

Rows are written once, as .jsonl files in psft's cache, by the checksum of the file they come from:

    CACHE/harness/TASK-CHECKSUM/NAME/SPLIT.jsonl     NAME: of the hub's configuration: a subject, `main`, ...

lm-eval reads them with datasets' `json` builder. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psft.errors import RequestError, first_line, shown
from psft.evaluation.harness.registry import HarnessTask
from psft.evaluation.items import read_rows
from psft.machine import cache_folder

Rows = dict[tuple[str, str], list[dict[str, Any]]]
"""By (name of the hub's configuration, split)."""
GPQA_SEED = 0
"""lm-eval's default for Python's random numbers, by which it shuffles GPQA's options."""
_LAYOUT = 1
"""Of the files written; rises when a reader changes what it writes."""


@dataclass(frozen=True)
class LocalData:
    """files: name of configuration -> split -> path. source, sha256: the file they come from. notes: what differs."""

    files: Mapping[str, Mapping[str, Path]]
    source: str
    sha256: str
    num_rows: int
    notes: tuple[str, ...] = ()


def find_file(task: HarnessTask, data_dir: Path | None) -> Path | None:
    """The task's file under the data folder; None if there is none."""
    path = data_dir / task.file if data_dir is not None and task.file is not None else None
    return path if path is not None and path.is_file() else None


def why_absent(task: HarnessTask, data_dir: Path | None) -> str:
    """In words: what is missing and how to get it."""
    if task.file is None:
        return f"{task.title}: {task.how_to_get}"
    where = f"not in {data_dir}" if data_dir is not None else "no --data_dir was given"
    return f"{task.title}: {task.file}: {where}. {task.how_to_get}"


def prepare(task: HarnessTask, path: Path, *, any_rows: bool = False) -> LocalData:
    """The rows of a local file, written where lm-eval can read them.

    Raises:
        RequestError: the file cannot be read, lacks a field, or has not the expected number of rows.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}. Check its rights.") from error
    sha256 = hashlib.sha256(content).hexdigest()
    rows = _READERS[task.reader](path, content)
    counts = {split: sum(len(part) for (_, own), part in rows.items() if own == split) for split in task.rows}
    notes = []
    if counts != dict(task.rows):
        text = f"{path} has {_counted(counts)} rows; {task.title} has {_counted(task.rows)}"
        if not any_rows:
            raise RequestError(f"{text}. Get the whole set, or add --any_rows to take it as it is.")
        notes.append(text)
    if task.sha256 not in (None, sha256):
        notes.append(f"{path} is not the registered copy (SHA-256 {sha256[:12]}..., not {str(task.sha256)[:12]}...)")
    folder = cache_folder() / "harness" / f"{task.reader}-{sha256[:16]}-{_LAYOUT}"
    if not folder.is_dir():
        _write(rows, folder)
    files: dict[str, dict[str, Path]] = {}
    for name, split in rows:
        files.setdefault(name, {})[split] = folder / name / f"{split}.jsonl"
    return LocalData(files, str(path), sha256, sum(counts.values()), tuple(notes))


def _counted(rows: Mapping[str, int]) -> str:
    return " and ".join(f"{count:,} {split}" for split, count in rows.items())


def _write(rows: Rows, folder: Path) -> None:
    """All files or none: a folder that is there is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for (name, split), part in rows.items():
            place = made / name / f"{split}.jsonl"
            place.parent.mkdir(exist_ok=True)
            place.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
        os.chmod(made, 0o755)  # mkdtemp's is for its owner alone
        os.replace(made, folder)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if not folder.is_dir():  # else another process was first, with the same rows
            raise


def _read_gsm8k(path: Path, content: bytes) -> Rows:
    return {("main", "test"): [_pick(row, ("question", "answer"), where) for where, row in _numbered(path)]}


def _read_truthfulqa(path: Path, content: bytes) -> Rows:
    keys = ("question", "mc1_targets", "mc2_targets")
    return {("multiple_choice", "validation"): [_pick(row, keys, where) for where, row in _numbered(path)]}


def _read_mmlu(path: Path, content: bytes) -> Rows:
    """.../SPLIT/SUBJECT_SPLIT.csv without a header: question, four choices, letter."""
    found: Rows = {}
    for where, split, name, text in _members(path, content):
        subject = name.removesuffix(f"_{split}")
        rows = []
        for number, cells in enumerate(csv.reader(io.StringIO(text, newline="")), start=1):
            if len(cells) != 6 or cells[5] not in ("A", "B", "C", "D"):
                raise RequestError(f"{where}: row {number} is no question, four choices and a letter. Get it again.")
            answer = "ABCD".index(cells[5])
            rows.append({"question": cells[0], "subject": subject, "choices": cells[1:5], "answer": answer})
        found[subject, split] = rows
    return found


def _read_cmmlu(path: Path, content: bytes) -> Rows:
    """SPLIT/SUBJECT.csv with a header: a number, Question, A, B, C, D, Answer."""
    keys = ("Question", "A", "B", "C", "D", "Answer")
    found: Rows = {}
    for where, split, subject, text in _members(path, content):
        rows = enumerate(csv.DictReader(io.StringIO(text, newline="")), start=1)
        found[subject, split] = [_pick(row, keys, f"{where}: row {number}") for number, row in rows]
    return found


def _read_gpqa(path: Path, content: bytes) -> Rows:
    """The options already in lm-eval's order, so its task need not shuffle.

    lm-eval shuffles with Python's global random numbers each time it looks at the rows. Only datasets' cache of mapped
    rows keeps the prompt and the grading at one order: with that cache off, answers are graded against another order
    than was asked, and with an old one the order is whatever the first run on the machine made it. What stands here is
    lm-eval's order with a fresh cache and its default seed (tests/evaluation/harness/test_data.py).
    """
    order = random.Random(GPQA_SEED)
    rows = []
    for where, row in _numbered(path):
        given = _pick(row, ("Question", *(f"Incorrect Answer {i}" for i in (1, 2, 3)), "Correct Answer"), where)
        question, *options = given.values()
        options = [_gpqa_text(option) for option in options]
        right = options[3]
        order.shuffle(options)
        letter = "ABCD"[options.index(right)]
        numbered = {f"choice{i}": option for i, option in enumerate(options, start=1)}
        rows.append({"Question": question, **numbered, "choices": options, "answer": f"({letter})"})
    return {(path.stem, "train"): rows}


def _gpqa_text(text: str) -> str:
    """As lm-eval's task cleans an option."""
    return text.strip().replace(" [title]", ". ").replace("  ", " ")


_READERS: dict[str, Callable[[Path, bytes], Rows]] = {
    "gsm8k": _read_gsm8k,
    "mmlu": _read_mmlu,
    "truthfulqa": _read_truthfulqa,
    "cmmlu": _read_cmmlu,
    "gpqa": _read_gpqa,
}


def _numbered(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(read_rows(path), start=1):
        yield f"{path}: row {number}", row


def _pick(row: Mapping[Any, Any], keys: tuple[str, ...], where: str) -> dict[str, Any]:
    missing = [key for key in keys if row.get(key) in (None, "")]
    if missing:
        raise RequestError(f"{where}: field {missing[0]!r} is missing. Get the file again, or correct it.")
    return {key: row[key] for key in keys}


def _members(path: Path, content: bytes) -> Iterator[tuple[str, str, str, str]]:
    """(where, split, name, text) of each CSV file of a zip that lies in a folder `test` or `dev`."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in sorted(archive.namelist()):
                parts = Path(member).parts
                if member.endswith(".csv") and len(parts) >= 2 and parts[-2] in ("test", "dev"):
                    yield f"{path}: {member}", parts[-2], Path(member).stem, archive.read(member).decode("utf-8-sig")
    except (zipfile.BadZipFile, UnicodeDecodeError, OSError) as error:
        raise RequestError(f"{path} cannot be read: {shown(first_line(error))}. Copy it there again.") from error
