"""Writing and reading the files of one run: lines are written whole and flushed, JSON files appear complete or not."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from psft.errors import RequestError
from psft.runs.checkpoints import BEST

RUN_FILES = (
    "run.json",
    "metrics.jsonl",
    "probe.jsonl",
    "clipped_tokens.parquet",
    "eval.jsonl",
    "rejected.jsonl",
    "answers.jsonl",
    "reward_failures.jsonl",
    "summary.json",
)
"""The files a run owns beside its checkpoints and the model."""
EVALUATION = "evaluation"
"""Folder of what was sampled and graded: `step-N` while training, `checkpoint-N` and `final` by psft eval."""
_MODEL_FILES = re.compile(
    r"(model|adapter_model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|vocab|added_tokens)\.json"
    r"|chat_template\.jinja|merges\.txt|tokenizer\.model|training_args\.bin|README\.md"
)


class RunFolder:
    """The folder of one run.

    `claim` is called once by whoever starts a run; readers need only the path. One process writes; readers may come at
    any time and never see half a row.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def holds_run(self) -> bool:
        """Whether a run was claimed here or has written metrics here."""
        return any((self.path / name).exists() for name in ("run.json", "metrics.jsonl"))

    def check_writable(self) -> None:
        """Raise `RequestError` if the folder could not be made or written; makes and changes nothing."""
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise RequestError(f"output_dir {self.path}: {nearest} is a file. Choose another --output_dir.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise RequestError(
                f"output_dir {self.path} cannot be written: no permission in {nearest}, or a read-only disk. Choose "
                "another --output_dir."
            )

    def claim(self, overwrite: bool = False) -> None:
        """Make the folder, ready for a new run.

        With overwrite, what a former run left (its files, checkpoints, model) is removed; any other file is kept.

        Raises:
            RequestError: the path is a file, cannot be made or written, or holds another run and overwrite is False.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"output_dir {self.path} is a file. Give a folder, e.g. --output_dir {self.path}-run.")
        if self.holds_run() and not overwrite:
            raise RequestError(
                f"output_dir {self.path} holds another run. Go on with it by --resume, choose another --output_dir, or "
                "replace it with --overwrite_output_dir."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise RequestError(
                f"output_dir {self.path} cannot be written: {error.strerror or error}. Choose another --output_dir."
            ) from error
        if self.holds_run():
            self._remove_run()

    def _remove_run(self) -> None:
        for item in self.path.iterdir():
            if item.is_dir() and not item.is_symlink():
                if re.fullmatch(r"checkpoint-\d+", item.name):
                    shutil.rmtree(item)
                elif item.name == EVALUATION:
                    for part in item.glob("step-*"):  # made while training; what psft eval made of it stays
                        shutil.rmtree(part)
            elif item.name in RUN_FILES or _MODEL_FILES.fullmatch(item.name):
                item.unlink()
            elif item.name == BEST and item.is_symlink():
                item.unlink()

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON file that is never seen half written (temporary file, then rename). NaN and inf become null."""
        path = self.path / name
        text = json.dumps(to_json(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.path.mkdir(parents=True, exist_ok=True)
        replace_file(path, _encoded(text))
        return path

    def read_json(self, name: str) -> dict[str, Any]:
        """Read what `write_json` wrote.

        Raises:
            RequestError: the file is missing or is no JSON object.
        """
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RequestError(f"{path} is missing. Is {self.path} the folder of a psft run?") from None
        except ValueError as error:
            raise RequestError(f"{path} is not valid JSON: {error}. Restore the file, or repeat the run.") from error
        if not isinstance(content, dict):
            raise RequestError(
                f"{path} holds {type(content).__name__}, not a JSON object. Restore it, or repeat the run."
            )
        return content

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one row as one whole line, in a single write. NaN and infinities become null.

        If the file ends in a torn row (a crash), the torn row is cut off first: it was never a row.
        """
        line = _encoded(json.dumps(to_json(row), ensure_ascii=False, allow_nan=False)) + b"\n"
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / name
        cut_torn_end(path)
        with open(path, "ab", buffering=0) as file:
            file.write(line)

    def cut_back(self, step: int, *, num_eval_rows: int | None = None) -> None:
        """Remove the rows of metrics.jsonl, probe.jsonl, eval.jsonl, answers.jsonl and reward_failures.jsonl that a run
        resumed from a checkpoint repeats.
        A file is replaced whole or stays as it was.

        Args:
            step: of the checkpoint; 0 = the run begins again. Rows of later steps go.
            num_eval_rows: rows eval.jsonl had when the checkpoint was written; later ones go, of `step` itself, too:
                what is measured after a checkpoint is measured again. None = not known, by step alone.
        """
        of_steps = ("metrics.jsonl", "probe.jsonl", "answers.jsonl", "reward_failures.jsonl")
        for name, number in (*((name, None) for name in of_steps), ("eval.jsonl", num_eval_rows)):
            rows = self.read_rows(name)
            kept = [row for row in rows[: 0 if step == 0 else number] if row.get("step", 0) <= step]
            path = self.path / name
            if path.exists():
                lines = b"".join(_encoded(json.dumps(row, ensure_ascii=False)) + b"\n" for row in kept)
                replace_file(path, lines)

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """All whole rows of a .jsonl file, none if it is missing. A last line without its newline is torn and left out.

        Raises:
            RequestError: another line is no JSON object; the message names file and line.
        """
        path = self.path / name
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        rows = []
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or torn
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise RequestError(f"{path}:{number}: not valid JSON ({error}). Repair or remove this line.") from error
            if not isinstance(row, dict):
                raise RequestError(f"{path}:{number}: a row must be a JSON object. Repair or remove this line.")
            rows.append(row)
        return rows


def to_json(value: Any) -> Any:
    """The value in terms JSON has.

    NaN and infinities become null, enums their value, sets sorted lists, arrays plain numbers; anything else text.
    """
    if isinstance(value, Enum):
        return to_json(value.value)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key.value if isinstance(key, Enum) else key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item) for item in value), key=str)
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return to_json(value.tolist())
    return str(value)


def _encoded(text: str) -> bytes:
    """JSON as UTF-8. What has no encoding, half a surrogate pair of a file name say, stays as JSON's own escape."""
    return text.encode(errors="backslashreplace")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is never seen half written: a temporary one beside it, then a rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private; a run is as readable as any other file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cut_torn_end(path: Path) -> None:
    """Cut off what follows the last newline of a file of lines: a row that a crash left half written."""
    try:
        with open(path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return
            file.seek(size - 1)
            if file.read(1) == b"\n":
                return
            end = size
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    file.truncate(start + newline + 1)
                    return
                end = start
            file.truncate(0)
    except FileNotFoundError:
        return
