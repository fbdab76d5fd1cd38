"""What a stage's result follows from, by content: its command, its settings, the files they name, the stages before it.

Two requests with one key give one result. Settings that change no result (how many processes, what is logged where)
are left out, and so is psft's version: an upgrade repeats no training by itself. A file counts by its bytes, whatever
its name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from psft.checksums import sha256_of
from psft.errors import RequestError, shown
from psft.pipelines.commands import STAGE_COMMANDS
from psft.pipelines.stage import Reference, Stage
from psft.recipes import load_recipe

WITHOUT_EFFECT = frozenset({
    "num_processes", "accelerate", "logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name",
    "disable_tqdm", "dataloader_num_workers", "dataset_num_proc", "data_cache", "data_cache_dir", "ref_cache_dir",
    "save_total_limit", "batch_size", "concurrency", "request_timeout", "max_retries", "reward_workers", "data_dir",
    "eval_suite_batch_size", "eval_suite_data_dir", "skip_missing", "download", "eval_suite_download", "stage",
    "output_dir",
})  # fmt: skip
"""Settings that decide how a result is made, not what it is; of the data folders the files in them count."""
_DATA = ("dataset", "eval_dataset")
_FILES = (
    *_DATA, "probe_prompts", "chat_template_path", "replay_file", "contamination_against", "compare_to", "base",
    "model", "model_name_or_path", "ref_model_name_or_path",
)  # fmt: skip
_SUITES = {"suite": "data_dir", "eval_suite": "eval_suite_data_dir"}
"""Setting that names benchmarks -> the one that names the folder with their data."""


def settings_of(stage: Stage) -> dict[str, Any]:
    """The stage's settings over its recipe's, without defaults; the model under its setting's name, or `model`."""
    settings = {**(load_recipe(stage.recipe) if stage.recipe else {}), **stage.settings}
    if stage.model is not None:
        settings[STAGE_COMMANDS[stage.command].model_setting or "model"] = stage.model
    if stage.runs:
        settings["runs"] = list(stage.runs)
    return {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}


def parts_of(stage: Stage, upstream: Mapping[str, str]) -> dict[str, Any]:
    """What the stage's result follows from, as plain values.

    Args:
        upstream: for each stage it refers to, which result of that stage this is (`executor.making`).
    Raises:
        RequestError: a file that a setting names cannot be read.
    """
    settings = settings_of(stage)
    return {
        "command": stage.command,
        "settings": _plain(settings),
        "inputs": dict(_inputs(settings)),
        "upstream": {name: upstream[name] for name in sorted(upstream)},
    }


def key_of(parts: Mapping[str, Any]) -> str:
    """SHA-256 in hex of the parts; a setting whose files are among the inputs counts by their content alone."""
    inputs = parts["inputs"]
    in_files = {name.partition(" ")[0] for name in inputs}
    by_content = {
        "command": parts["command"],
        "settings": {name: value for name, value in parts["settings"].items() if name not in in_files},
        "inputs": sorted([name.partition(" ")[0], digest] for name, digest in inputs.items()),
        "upstream": parts["upstream"],
    }
    return hashlib.sha256(json.dumps(by_content, sort_keys=True).encode()).hexdigest()


def what_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The difference between two parts, in words."""
    words = []
    if before.get("command") != now["command"]:
        words.append(f"the command was {before.get('command')} and is {now['command']}")
    old, new = _mapping(before.get("settings")), now["settings"]
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name) or (name in old) != (name in new):
            words.append(f"{name}: {_value(old, name)} -> {_value(new, name)}")
    old, new = _mapping(before.get("inputs")), now["inputs"]
    words += [
        f"the content of {name.partition(' ')[2]} has changed" for name in new if name in old and old[name] != new[name]
    ]
    old, new = _mapping(before.get("upstream")), now["upstream"]
    words += [f"stage {name} is another one" for name in new if old.get(name) != new[name]]
    return words or ["a file that it reads has come or gone"]


def _inputs(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """ "SETTING PATH" and digest of every file and folder that the settings name and that is here."""
    for name in _FILES:
        for text in _texts(settings.get(name)):
            source = text.partition("=")[2] if name == "eval_dataset" and not Path(text).exists() else text
            path = _path(source.partition("?")[0])
            if path is not None and (path.is_file() or name in _DATA or (path / "config.json").is_file()):
                yield f"{name} {source}", _digest(path)
    for name, data_dir in _SUITES.items():
        names = list(_texts(settings.get(name)))
        folder = settings.get(data_dir) or os.environ.get("PSFT_DATA_DIR")
        for path in _benchmark_files(names, None if folder is None else Path(str(folder)).expanduser()):
            yield f"{name} {path}", _digest(path)


def _benchmark_files(names: list[str], data_dir: Path | None) -> Iterator[Path]:
    """Suite files of one's own, and the data of all benchmarks that are named and here."""
    if not names:
        return
    from psft.evaluation import items
    from psft.evaluation.chosen import choose
    from psft.evaluation.harness import data as harness_data
    from psft.evaluation.harness.registry import choose_tasks, split_names
    from psft.evaluation.readiness.prompts import readiness_suite
    from psft.evaluation.readiness.settings import READINESS

    sampled, through_lm_eval = split_names(names)
    yield from (path for name in sampled if name.endswith((".yaml", ".yml")) and (path := _path(name)) is not None)
    try:
        is_readiness = READINESS in names  # which takes files of rows, too
        suite = readiness_suite(names) if is_readiness else choose(sampled)
        tasks = () if is_readiness else choose_tasks(through_lm_eval, None)
    except RequestError:  # the command says it, with the stage
        return
    found = [items.find_file(benchmark, data_dir) for benchmark in suite.benchmarks]
    found += [harness_data.find_file(task, data_dir) for task in tasks]
    yield from (path for path in found if path is not None)


def _digest(path: Path) -> str:
    try:
        if path.is_file():
            found = path.stat()
            return _digest_of_file(path, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        if (path / "config.json").is_file():
            from psft.evaluation.identity import folder_identity

            return folder_identity(path)
        from psft.data.digests import digest_of_folder

        return digest_of_folder(path)
    except OSError as error:
        raise RequestError(f"{shown(path)} cannot be read: {error.strerror or error}. Check the file.") from error


@functools.lru_cache(maxsize=256)
def _digest_of_file(path: Path, marks: tuple[int, ...]) -> str:
    """marks: another value after every write, so that a file is read once."""
    return sha256_of(path)


def _path(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, NUL, no such ~user: a name of something else
        return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Reference):
        return str(value)
    return value if isinstance(value, str | int | type(None)) else repr(value)  # inf has no JSON


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _value(settings: Mapping[str, Any], name: str) -> str:
    return shown(json.dumps(settings[name], ensure_ascii=False), 60) if name in settings else "not set"
