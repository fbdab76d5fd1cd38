"""From a benchmark's data to items: the prompt as messages, and what the grader needs to know.

Data come from a local file or, only when asked for, from the hub. Rows are checked: their number against what the
registry expects, each field by name with file and row. A checksum that differs is said, not hidden: results carry it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from psft.data.demonstrations import final_answer
from psft.data.gym import open_gym_task
from psft.errors import RequestError, first_line, shown
from psft.evaluation.benchmarks import Benchmark
from psft.evaluation.samples import digest

OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHUFFLE_SEED = 0
"""Of the order of options: the same for every model and seed of the evaluation, so that all answer the same items."""


@dataclass(frozen=True)
class Item:
    """One question. id: unique in its benchmark; question: its bare text; grading: the grader's fields but response."""

    id: str
    question: str
    messages: tuple[dict[str, str], ...]
    grading: Mapping[str, Any]

    @property
    def prompt_hash(self) -> str:
        return digest(list(self.messages))


@dataclass(frozen=True)
class Data:
    """A benchmark's items with where they are from. sha256: of the file's bytes, or of the hub's rows as JSON.

    notes: what differs from the registry, in words; num_rows: of the whole set, whatever the limit.
    """

    benchmark: Benchmark
    items: tuple[Item, ...]
    source: str
    sha256: str
    num_rows: int
    notes: tuple[str, ...] = field(default=())


def find_file(benchmark: Benchmark, data_dir: Path | None) -> Path | None:
    """The benchmark's file: beside its own suite file, else under the data folder; None if it is in neither."""
    for folder in (benchmark.folder, data_dir):
        if folder is not None and (folder / benchmark.file).is_file():
            return folder / benchmark.file
    return None


def why_absent(benchmark: Benchmark, data_dir: Path | None, *, prefix: str = "--") -> str:
    """In words: what is missing and how to get it. prefix: of the options data_dir and download."""
    where = f"not in {data_dir}" if data_dir is not None else f"no {prefix}data_dir was given"
    how = benchmark.how_to_get.replace("--download", f"{prefix}download")
    if not how and benchmark.hub is not None:
        how = f"Add {prefix}download to fetch it from the hub ({benchmark.hub.id}), or put the file there."
    return f"{benchmark.shown_name}: {benchmark.file}: {where}. {how or 'Put the file there.'}"


def load_data(benchmark: Benchmark, data_dir: Path | None, *, download: bool = False, any_rows: bool = False) -> Data:
    """The items of a benchmark.

    Args:
        download: fetch from the hub what is not here.
        any_rows: take a file whose number of rows is not the expected one.
    Raises:
        RequestError: the data are absent, unreadable, of another size, or a row lacks a field.
    """
    path = find_file(benchmark, data_dir)
    if benchmark.is_made:
        rows = _made_rows(benchmark.file)
        source, sha256 = benchmark.file, digest(rows)
        mapping, expected = benchmark.fields, benchmark.rows
    elif path is not None:
        content = _read_bytes(path)
        rows = list(_parse(content, path))
        source, sha256 = str(path), hashlib.sha256(content).hexdigest()
        mapping, expected = benchmark.fields, benchmark.rows
    elif download and benchmark.hub is not None:
        rows = _read_hub(benchmark)
        source = "hub:" + ":".join(filter(None, [benchmark.hub.id, benchmark.hub.config, benchmark.hub.split]))
        sha256 = digest(rows)
        mapping, expected = benchmark.hub.fields or benchmark.fields, benchmark.hub.rows or benchmark.rows
    else:
        raise RequestError(why_absent(benchmark, data_dir))
    notes = []
    if expected is not None and len(rows) != expected:
        text = f"{source} has {len(rows)} rows; {benchmark.shown_name} has {expected}"
        if not any_rows:
            raise RequestError(f"{text}. Get the whole set, or add --any_rows to take it as it is.")
        notes.append(text)
    if path is not None and benchmark.sha256 not in (None, sha256):
        notes.append(f"{source} is not the registered copy (SHA-256 {sha256[:12]}..., not {benchmark.sha256[:12]}...)")  # type: ignore[index]
    rows_used = _distinct(rows, mapping["question"]) if benchmark.distinct else rows
    items = tuple(_items(benchmark, mapping, rows_used[: benchmark.limit], source))
    return Data(benchmark, items, source, sha256, len(rows), tuple(notes))


def _distinct(rows: list[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    """The first row of each question, in order."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(json.dumps(_look_up(row, question), default=str), row)
    return list(found.values())


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}. Check its rights.") from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl, .json, .csv (each also .gz) or .parquet file; those of .jsonl one by one as they are read.

    Raises:
        RequestError: it cannot be read, with the line.
    """
    if not path.name.lower().endswith(".jsonl"):
        return _parse(_read_bytes(path), path)
    try:
        return _json_lines(open(path, "rb"), path)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}. Check its name and rights.") from error


def _parse(content: bytes, path: Path) -> Iterator[dict[str, Any]]:
    name = path.name.lower()
    try:
        if name.endswith(".gz"):
            content, name = gzip.decompress(content), name.removesuffix(".gz")
        if name.endswith(".parquet"):
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(io.BytesIO(content)).iter_batches(batch_size=1000):
                yield from batch.to_pylist()
            return
        text = "" if name.endswith(".jsonl") else content.decode("utf-8-sig")
    except Exception as error:  # gzip, pyarrow and codecs each have their own
        raise RequestError(f"{path} cannot be read: {shown(first_line(error))}. Copy it there again.") from error
    if name.endswith(".csv"):
        csv.field_size_limit(1 << 30)
        yield from csv.DictReader(io.StringIO(text, newline=""))
    elif name.endswith(".json"):
        yield from _json_rows(text, path)
    elif name.endswith(".jsonl"):
        yield from _json_lines(io.BytesIO(content), path)
    else:
        raise RequestError(f"{path} is of an unknown kind. Known: .jsonl, .json, .csv, each also .gz, and .parquet.")


def _json_lines(file: IO[bytes], path: Path) -> Iterator[dict[str, Any]]:
    with file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield _object(line, f"{path}:{number}")


def _json_rows(text: str, path: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{path}: not valid JSON ({error}). Correct it.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RequestError(f"{path} must hold a list of objects. Correct it.")
    yield from rows


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:  # of UTF-8, too
        raise RequestError(f"{where}: not valid JSON ({error}). Correct it.") from error
    if not isinstance(row, dict):
        raise RequestError(f"{where}: a row must be a JSON object. Correct it.")
    return row


def _made_rows(source: str) -> list[dict[str, Any]]:
    """Of reasoning-gym, the same for the same source: question, answer, and what its own grader finds the entry by."""
    return [
        {
            "id": str(index), "question": entry["question"], "answer": str(entry["answer"]), "gym_source": source,
            "gym_index": index,
        }
        for index, entry in enumerate(open_gym_task(source))
    ]  # fmt: skip


def _read_hub(benchmark: Benchmark) -> list[dict[str, Any]]:
    assert benchmark.hub is not None
    from datasets import load_dataset

    hub = benchmark.hub
    try:
        return [dict(row) for row in load_dataset(hub.id, hub.config, split=hub.split)]
    except Exception as error:  # datasets and huggingface_hub have no common type for what the network does
        raise RequestError(
            f"{benchmark.shown_name}: {hub.id} cannot be fetched from the hub ({shown(first_line(error))}). Check the "
            f"network and your rights there, or put {benchmark.file} under --data_dir."
        ) from error


def _items(benchmark: Benchmark, mapping: Mapping[str, Any], rows: list[dict[str, Any]], source: str) -> Iterator[Item]:
    taken: set[str] = set()
    for number, row in enumerate(rows, start=1):
        where = f"{source}: row {number}"
        name = _identity(row, mapping.get("id"))
        if name is None or name in taken:  # ARC's copy has rows without an id; position tells them apart
            name = f"{name or 'row'}#{number}"
        taken.add(name)
        if benchmark.kind == "choice":
            yield _choice_item(benchmark, mapping, row, name, where)
        else:
            yield _plain_item(benchmark, mapping, row, name, where)


def _identity(row: Mapping[str, Any], names: Any) -> str | None:
    if names is None:
        return None
    parts = [_look_up(row, name) for name in (names if isinstance(names, list) else [names])]
    return None if any(part in (None, "") for part in parts) else "-".join(map(str, parts))


def _plain_item(
    benchmark: Benchmark, mapping: Mapping[str, Any], row: Mapping[str, Any], name: str, where: str
) -> Item:
    messages = _conversation(_look_up(row, mapping["question"]))
    if messages:
        question = messages[-1]["content"]
    else:
        question = _text(row, mapping["question"], where)
        messages = _messages(benchmark, {"question": question})
    if benchmark.kind == "ifeval":
        grading: dict[str, Any] = {"prompt": question}
        grading |= {key: _required(row, mapping[key], where) for key in ("instruction_id_list", "kwargs")}
    elif benchmark.kind == "reasoning_gym":
        grading = {key: _required(row, mapping[key], where) for key in ("gym_source", "gym_index")}
    else:
        gold = _required(row, mapping["gold"], where)
        grading = {"gold": (final_answer(gold) or gold) if isinstance(gold, str) else gold}  # of GSM8K's solutions
    return Item(name, question, messages, grading)


def _conversation(value: Any) -> tuple[dict[str, str], ...]:
    """The messages up to the last one of the user, where a prompt is a conversation, as DAPO-Math's; else none."""
    if not isinstance(value, list) or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in value):
        return ()
    last = max((i for i, message in enumerate(value) if message["role"] == "user"), default=-1)
    return tuple({"role": str(m["role"]), "content": str(m["content"])} for m in value[: last + 1])


def _choice_item(
    benchmark: Benchmark, mapping: Mapping[str, Any], row: Mapping[str, Any], name: str, where: str
) -> Item:
    from psft.rewards.choice import shuffle_options

    question = _text(row, mapping["question"], where)
    paths = mapping["options"]
    found = [_required(row, path, where) for path in paths] if isinstance(paths, list) else _required(row, paths, where)
    if not isinstance(found, list) or not 2 <= len(found) <= len(OPTION_LETTERS):
        raise RequestError(f"{where}: 'options' must be a list of 2 to {len(OPTION_LETTERS)} texts. Correct it.")
    options = [str(option).strip() for option in found]
    gold = _gold_index(mapping, row, len(options), where)
    if benchmark.shuffle:
        options, letter = shuffle_options(options, gold, SHUFFLE_SEED, name)
    else:
        letter = OPTION_LETTERS[gold]
    letters = OPTION_LETTERS[: len(options)]
    parts = {
        "question": question,
        "options": "\n".join(f"{letter}) {option}" for letter, option in zip(letters, options, strict=True)),
        "letters": ", ".join(letters[:-1]) + f" or {letters[-1]}",
    }
    return Item(name, question, _messages(benchmark, parts), {"gold": letter, "options": options})


def _gold_index(mapping: Mapping[str, Any], row: Mapping[str, Any], num_options: int, where: str) -> int:
    index: Any = None
    if mapping.get("gold_index") == "first":
        index = 0
    elif "gold_index" in mapping:
        index = _required(row, mapping["gold_index"], where)
    elif "gold_letter" in mapping:
        index = OPTION_LETTERS.find(str(_required(row, mapping["gold_letter"], where)).strip().upper() or "?")
    elif "gold_flags" in mapping:
        flags = [bool(flag) for flag in _required(row, mapping["gold_flags"], where)]
        index = flags.index(True) if sum(flags) == 1 else None
    else:
        labels = [str(label) for label in _required(row, mapping["option_labels"], where)]
        gold = str(_required(row, mapping["gold_label"], where))
        index = labels.index(gold) if labels.count(gold) == 1 else None
    try:
        number = int(index)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < num_options:
        raise RequestError(f"{where}: it does not say which of its {num_options} options is right. Correct it.")
    return number


def _messages(benchmark: Benchmark, parts: Mapping[str, str]) -> tuple[dict[str, str], ...]:
    # One pass: braces inside a question are text.
    content = re.sub(r"\{(question|options|letters)\}", lambda found: parts.get(found[1], found[0]), benchmark.template)
    user = {"role": "user", "content": content}
    return ({"role": "system", "content": benchmark.system_prompt}, user) if benchmark.system_prompt else (user,)


def _look_up(row: Any, path: str) -> Any:
    """A field by its dotted path; through a list it is the list of what each entry has. None if there is no such."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    for part in path.split("."):
        if isinstance(row, list):
            row = [entry.get(part) if isinstance(entry, Mapping) else None for entry in row]
        elif isinstance(row, Mapping):
            row = row.get(part)
        else:
            return None
    return row


def _required(row: Mapping[str, Any], path: str, where: str) -> Any:
    value = _look_up(row, path)
    if value is None:
        raise RequestError(f"{where}: field {path!r} is missing. Correct the data, or the suite's `fields`.")
    return value


def _text(row: Mapping[str, Any], path: str, where: str) -> str:
    value = _required(row, path, where)
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{where}: field {path!r} is no text, or empty. Correct the data.")
    return value
