"""A pipeline file: named stages, each a command with its settings, and references to what earlier stages leave.

    pipeline: mine                      # its name
    output_dir: runs/mine               # a folder a stage in it, and pipeline.json
    shared:
      eval: {suite: math, k: 8}         # settings of every stage of that command
    stages:
      - name: psft
        command: train
        recipe: math-qwen2.5-7b-psft
        settings: {num_processes: 8}    # named as the command's flags; over shared, and that over the recipe
      - name: scores
        command: eval
        model: ${psft.model}            # the one notation: ${STAGE.RESULT}, alone in its value

Whether a setting exists and its value fits is for the command to say: `psft.cli.check_stages` asks it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from psft.errors import RequestError, shown
from psft.pipelines.commands import STAGE_COMMANDS
from psft.pipelines.stage import Reference, Stage
from psft.recipes import PIPELINE, load_recipe

_KEYS = (PIPELINE, "output_dir", "shared", "stages")
_STAGE_KEYS = ("name", "command", "recipe", "model", "runs", "settings")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TAKEN = ("aside",)
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")


@dataclass(frozen=True)
class Pipeline:
    """name: for people. source: the recipe's name or the file, as it was asked for."""

    name: str
    source: str
    output_dir: str
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            RequestError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise RequestError(
            f"{self.source}: no stage {shown(repr(name), 40)}.{_nearest(name, [s.name for s in self.stages])}"
        )

    def launched(self, settings: Mapping[str, Any]) -> Pipeline:
        """The same with settings of the launch (num_processes, accelerate) in every stage that trains."""
        stages = tuple(
            replace(stage, settings={**stage.settings, **settings})
            if STAGE_COMMANDS[stage.command].makes_model
            else stage
            for stage in self.stages
        )
        return replace(self, stages=stages)

    def upstream(self, stage: Stage) -> list[Stage]:
        """The stages that this one refers to, in order."""
        named = {reference.stage for reference in stage.references()}
        return [other for other in self.stages if other.name in named]

    def base_model(self, stage: Stage) -> str | None:
        """The model that training began from, followed back through references; None where nobody names one."""
        seen = stage
        while isinstance(seen.model, Reference):
            seen = self.stage(seen.model.stage)
        if seen.model is not None:
            return str(seen.model)
        name = load_recipe(seen.recipe).get("model_name_or_path") if seen.recipe else None
        return None if name is None else str(name)


def read_pipeline(name_or_path: str) -> Pipeline:
    """The pipeline of a recipe by name, or of a YAML file by path.

    Raises:
        RequestError: it cannot be read or is none; unknown keys (with the nearest), stages without name or command, two
            of one name, references that lead nowhere or forward. All of them in one message.
    """
    content = load_recipe(name_or_path)
    source = shown(name_or_path)
    if PIPELINE not in content:
        advice = ""
        if "stages" not in content:
            advice = f" It is a recipe: psft {shown(content.get('stage', 'train'), 20)} {source} runs it."
        raise RequestError(f"{source} is no pipeline: it has no key `{PIPELINE}: NAME`.{advice}")
    problems: list[str] = []
    problems += [f"unknown key {shown(repr(key), 40)}.{_nearest(key, _KEYS)}" for key in content if key not in _KEYS]
    name = content[PIPELINE]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.append(f"`{PIPELINE}` is {shown(repr(name), 40)}; give it a plain name of letters, digits, - and _.")
    output_dir = content.get("output_dir", f"runs/{name}")
    if not isinstance(output_dir, str):
        problems.append(f"`output_dir` is {shown(repr(output_dir), 40)}; give a folder.")
    shared = _shared(content.get("shared"), problems)
    stages = _stages(content.get("stages"), shared, problems)
    if problems:
        text = problems[0] if len(problems) == 1 else "\n".join(["", *(f"  - {problem}" for problem in problems)])
        raise RequestError(f"{source}: {text}")
    return Pipeline(str(name), name_or_path, str(output_dir), tuple(stages))


def _shared(content: Any, problems: list[str]) -> dict[str, dict[str, Any]]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        problems.append("`shared` must be a mapping of commands to settings, as `shared: {eval: {k: 8}}`.")
        return {}
    found = {}
    for command, settings in content.items():
        if command not in STAGE_COMMANDS:
            problems.append(f"shared: no command {shown(repr(command), 40)}.{_nearest(command, STAGE_COMMANDS)}")
        elif not isinstance(settings, dict):
            problems.append(f"shared: {command} must be a mapping of settings.")
        else:
            found[command] = settings
    return found


def _stages(content: Any, shared: Mapping[str, Mapping[str, Any]], problems: list[str]) -> list[Stage]:
    if not isinstance(content, list) or not content:
        problems.append("`stages` must be a list of stages, each with name and command. Add them.")
        return []
    names = [entry.get("name") for entry in content if isinstance(entry, dict)]
    stages: list[Stage] = []
    for number, entry in enumerate(content, start=1):
        if not isinstance(entry, dict):
            problems.append(f"stage {number} must be a mapping with name and command.")
            continue
        stage = _stage(number, entry, shared, stages, names, problems)
        stages += [stage] if stage is not None else []
    return stages


def _stage(
    number: int,
    entry: Mapping[str, Any],
    shared: Mapping[str, Mapping[str, Any]],
    earlier: Sequence[Stage],
    names: Sequence[Any],
    problems: list[str],
) -> Stage | None:
    name, before = entry.get("name"), len(problems)
    where = f"stage {shown(name, 40) if name else number}"
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _TAKEN:
        problems.append(
            f"{where}: `name` is {shown(repr(name), 40)}; give a plain one that can be a folder's, as psft."
        )
    elif name in [stage.name for stage in earlier]:
        problems.append(f"{where}: an earlier stage has this name. Give each its own.")
    problems += [
        f"{where}: unknown key {shown(repr(key), 40)}.{_nearest(key, _STAGE_KEYS)} Settings of the command belong "
        "under `settings`."
        for key in entry
        if key not in _STAGE_KEYS
    ]
    command = STAGE_COMMANDS.get(entry.get("command"))  # type: ignore[arg-type]
    if command is None:
        wrong = entry.get("command")
        problems.append(f"{where}: no command {shown(repr(wrong), 40)}.{_nearest(wrong, STAGE_COMMANDS)}")
        return None
    settings = entry.get("settings") or {}
    if not isinstance(settings, dict):
        problems.append(f"{where}: `settings` must be a mapping of the settings of psft {command.name}.")
        settings = {}
    settings = {**shared.get(command.name, {}), **settings}
    for key in settings:
        if key in command.owned:
            problems.append(f"{where}: {key} is the pipeline's own to set. Leave it out.")
        elif key == command.model_setting:
            problems.append(f"{where}: name the model in the stage's own key: `model: ...` instead of {key}.")
    recipe, model, runs = entry.get("recipe"), entry.get("model"), entry.get("runs")
    if recipe is not None:
        if not command.takes_recipe or not isinstance(recipe, str):
            problems.append(
                f"{where}: psft {command.name} takes no recipe like {shown(repr(recipe), 40)}. Leave it out."
            )
        else:
            problems += _recipe_problems(where, command.name, recipe)
    if model is not None and (not command.takes_model or not isinstance(model, str)):
        problems.append(f"{where}: psft {command.name} takes no model like {shown(repr(model), 40)}. Leave it out.")
        model = None
    if command.name == "eval" and model is None:
        problems.append(f"{where}: `model` is missing: what is evaluated, as ${{psft.model}} or a name.")
    if runs is not None and (command.name != "report" or not isinstance(runs, list)):
        problems.append(f"{where}: `runs` is a list of run folders, of a report alone. Leave it out.")
        runs = None
    if command.name == "report" and runs is None:
        runs = [f"${{{stage.name}.folder}}" for stage in earlier if STAGE_COMMANDS[stage.command].makes_model]
        if not runs:
            problems.append(f"{where}: no stage before it trains anything. Name `runs`, or put it after one.")
    made = [_with_references(value, where, earlier, names, problems) for value in (model, runs or [], settings)]
    if len(problems) > before:
        return None
    return Stage(str(name), command.name, recipe, made[0], tuple(made[1]), made[2])


def _recipe_problems(where: str, command: str, recipe: str) -> list[str]:
    try:
        content = load_recipe(recipe)
    except RequestError as error:
        return [f"{where}: {error}"]
    if PIPELINE in content:
        return [f"{where}: {shown(recipe)} is a pipeline, and one stage runs one command. Name a recipe."]
    own = content.get("stage", "train")
    return (
        []
        if own == command
        else [f"{where}: recipe {shown(recipe)} is for psft {shown(own, 20)}. Set `command: {own}`."]
    )


def _with_references(
    value: Any, where: str, earlier: Sequence[Stage], names: Sequence[Any], problems: list[str]
) -> Any:
    """The value with `${...}` read; what is wrong with one is a problem."""
    if isinstance(value, dict):
        return {key: _with_references(item, where, earlier, names, problems) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_references(item, where, earlier, names, problems) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    match = _REFERENCE.fullmatch(value)
    if match is None:
        problems.append(f"{where}: {shown(value, 60)}: a reference is ${{STAGE.RESULT}} and stands alone in its value.")
        return value
    name, _, result = match[1].rpartition(".")
    known = [stage.name for stage in earlier]
    if name not in known:
        what = "stands after it, and stages run in order" if name in names else "is no stage"
        advice = f"{_nearest(name, known)}" if known else " Nothing stands before it."
        problems.append(f"{where}: {value}: {shown(repr(name), 40)} {what}.{advice}")
        return value
    made = STAGE_COMMANDS[next(stage for stage in earlier if stage.name == name).command]
    if result not in made.results:
        what = shown(repr(result), 40)
        problems.append(f"{where}: {value}: psft {made.name} leaves no {what}.{_nearest(result, made.results)}")
    return Reference(name, result)


def _nearest(name: Any, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."
