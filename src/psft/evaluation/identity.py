"""Which model answered: a name for people, and an identity that changes when a byte of its files does.

A path is no identity: a run folder is trained again, a hub name gets a new revision. The identity is the SHA-256 over
the SHA-256 of every file that decides an answer. Checksums of large files are remembered in psft's cache by path, size
and time of change; a checkpoint's manifest is not believed, since weights put in their place have the same size.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from psft.checksums import sha256_of
from psft.errors import RequestError, first_line, shown
from psft.evaluation.samples import digest
from psft.machine import cache_folder
from psft.runs import RunFolder
from psft.runs.folder import replace_file

_DECISIVE = re.compile(
    r".*\.(safetensors|bin|gguf|py|model|tiktoken)|config\.json|generation_config\.json|tokenizer.*|vocab\..*"
    r"|special_tokens_map\.json|merges\.txt|added_tokens\.json|chat_template\..*|.*\.index\.json"
)
_NOT_DECISIVE = re.compile(r"optimizer.*|scheduler.*|training_args\.bin|rng_state.*|psft_.*")
_REMEMBERED = "checksums.json"
_SMALL = 16 << 20  # bytes: read again each time


@dataclass(frozen=True)
class Model:
    """name: for people and file names. identity: hex, or the server's name for it. folder: of its files, if here.

    run, step: the run folder it belongs to and the optimizer steps done; None for any other model.
    """

    name: str
    identity: str
    folder: Path | None = None
    run: Path | None = None
    step: int | None = None
    chat_template_sha256: str | None = None


def model_of_folder(name: str, folder: Path) -> Model:
    """The model in a folder, and the run it belongs to where it is a run's checkpoint or a run itself."""
    run, step = find_run(folder)
    is_checkpoint = run is not None and folder.resolve() != run.resolve()
    shown_name = f"{run.resolve().name}-{folder.resolve().name}" if run and is_checkpoint else Path(name).resolve().name
    return Model(plain_name(shown_name), folder_identity(folder), folder, run, step, chat_template_hash(folder))


def plain_name(name: str) -> str:
    """A name that can be part of a file's."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("._") or "model"


def find_run(folder: Path) -> tuple[Path | None, int | None]:
    """The run folder a model folder belongs to, and its step; (None, None) if to none.

    RUN/checkpoint-N has step N. RUN itself holds the model of the last step: summary.json says which.
    """
    match = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    parent = folder.resolve().parent
    if match and RunFolder(parent).holds_run():
        return parent, int(match[1])
    if RunFolder(folder).holds_run():
        try:
            step = RunFolder(folder).read_json("summary.json").get("steps")
        except RequestError:
            step = None
        return folder, int(step) if isinstance(step, int) else None
    return None, None


def folder_identity(folder: Path) -> str:
    """SHA-256 over names and checksums of the files that decide an answer, 64 hex digits.

    Raises:
        RequestError: there is none, or one cannot be read.
    """
    sums: dict[str, str] = {}
    try:
        for path in sorted(folder.iterdir()):
            if path.is_file() and _DECISIVE.fullmatch(path.name) and not _NOT_DECISIVE.fullmatch(path.name):
                sums[path.name] = _checksum(path)
    except OSError as error:
        raise RequestError(f"model folder {shown(folder)} cannot be read: {error.strerror or error}.") from error
    if not sums:
        raise RequestError(f"model folder {shown(folder)} holds no model file. Check the path.")
    return digest(sums)


def chat_template_hash(folder: Path) -> str | None:
    """SHA-256 of the chat template a tokenizer folder has; None without one."""
    with contextlib.suppress(OSError):
        return digest((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return digest(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"])
    return None


def template_hash(path: Path) -> str:
    """As `chat_template_hash`, of a template in a file of its own.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        return digest(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"chat template {shown(str(path))} cannot be read: {first_line(error)}.") from error


def _checksum(path: Path) -> str:
    """SHA-256 of a file, remembered for large ones."""
    status = path.stat()
    if status.st_size < _SMALL:
        return sha256_of(path)
    place = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    table = cache_folder() / _REMEMBERED
    try:
        known = json.loads(table.read_text(encoding="utf-8"))
        if isinstance(known.get(place), str):
            return str(known[place])
    except (OSError, ValueError, AttributeError):
        known = {}
    found = sha256_of(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        table.parent.mkdir(parents=True, exist_ok=True)
        replace_file(table, (json.dumps({**known, place: found}, indent=0) + "\n").encode())
    return found
