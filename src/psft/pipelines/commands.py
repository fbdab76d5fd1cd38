"""What each command takes from a pipeline and gives to later stages, and the command line of a stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psft.pipelines.stage import Reference, Stage
from psft.runs.checkpoints import linked_best
from psft.runs.folder import EVALUATION

_OF_TRAINING = ("output_dir", "overwrite_output_dir", "resume", "resume_from_checkpoint")


@dataclass(frozen=True)
class StageCommand:
    """A command as a stage.

    results: what `${STAGE.RESULT}` may name. owned: settings that the pipeline itself sees to. model_setting: the one
    that names the model; None where the model is the first argument. makes_model: it trains; its folder is a run.
    """

    name: str
    results: tuple[str, ...]
    owned: tuple[str, ...]
    takes_recipe: bool = False
    takes_model: bool = False
    model_setting: str | None = None
    makes_model: bool = False


def _training(name: str) -> StageCommand:
    return StageCommand(
        name, ("model", "last", "folder"), _OF_TRAINING, takes_recipe=True, takes_model=True,
        model_setting="model_name_or_path", makes_model=True,
    )  # fmt: skip


STAGE_COMMANDS: dict[str, StageCommand] = {
    "train": _training("train"),
    "dpo": _training("dpo"),
    "grpo": _training("grpo"),
    "eval": StageCommand("eval", ("results", "folder"), ("output_dir",), takes_model=True),
    "report": StageCommand("report", ("folder",), ("out", "watch", "every")),
}
"""By name. Results: `model` is the checkpoint that `best` leads to, else the last; `last` the model of the last step;
`folder` the stage's own; `results` the file with an evaluation's scores."""

Place = Callable[[Reference], str]
"""The path that a reference stands for."""


def arguments_of(stage: Stage, folder: Path, place: Place, *, resume: bool) -> list[str]:
    """What stands after `psft` on the stage's command line.

    Args:
        folder: the stage's own. resume: a training stage goes on from its newest checkpoint, if it has one.
    """
    command = STAGE_COMMANDS[stage.command]
    if stage.command == "report":
        bases = stage.settings.get("base", [])
        flags = [f"--base={_text(base, place)}" for base in (bases if isinstance(bases, list) else [bases])]
        flags += _flags({key: value for key, value in stage.settings.items() if key != "base"}, place)
        return ["report", *(_text(run, place) for run in stage.runs), *flags, f"--out={folder}"]
    flags = _flags(stage.settings, place)
    if stage.command == "eval":
        return ["eval", _text(stage.model, place), *flags, f"--output_dir={evaluation_folder(stage, folder, place)}"]
    model = [] if stage.model is None else [f"--{command.model_setting}={_text(stage.model, place)}"]
    going_on = ["--resume"] if resume else []
    recipe = [] if stage.recipe is None else [stage.recipe]
    return [stage.command, *recipe, *model, *flags, f"--output_dir={folder}", *going_on]


def evaluation_folder(stage: Stage, folder: Path, place: Place) -> Path:
    """Where an evaluation's samples and results go: of a run's model into the run, where reports look for them."""
    if not isinstance(stage.model, Reference):
        return folder
    return Path(place(Reference(stage.model.stage, "folder"))) / EVALUATION / stage.name


def model_left(folder: Path, result: str) -> Path | None:
    """The model that a training stage leaves, or None if it is not there. result: model or last."""
    best = linked_best(folder) if result == "model" else None
    model = folder if best is None else best
    return model if _holds_model(model) else None


def _holds_model(folder: Path) -> bool:
    weights = [
        *folder.glob("*.safetensors"),
        *folder.glob("*.safetensors.index.json"),
        *folder.glob("pytorch_model*.bin"),
    ]
    return bool(weights) and any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _flags(settings: Any, place: Place) -> list[str]:
    return [f"--{name}={_text(value, place)}" for name, value in settings.items()]


def _text(value: Any, place: Place) -> str:
    """A value as a flag's text that reads back as the same: lists and mappings as JSON."""
    if isinstance(value, Reference):
        return place(value)
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | dict):
        return json.dumps(_plain(value, place), ensure_ascii=False)
    return json.dumps(value, default=str)


def _plain(value: Any, place: Place) -> Any:
    if isinstance(value, Reference):
        return place(value)
    if isinstance(value, dict):
        return {str(key): _plain(item, place) for key, item in value.items()}
    return [_plain(item, place) for item in value] if isinstance(value, list | tuple) else value
