"""A request: an optional recipe, then flags over it, checked against the dataclasses that define the settings.

YAML keys, flags and Python arguments spell the same names; everything that is wrong is reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from psft.cli.values import BadValue, accepts_bool, convert, describe, is_dict, is_list, show_value
from psft.errors import RequestError, shown
from psft.recipes import PIPELINE, STAGE, STAGES, parse_settings, read_file

_SHORT_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "model": "model_name_or_path",
    "data": "dataset",
    "train_dataset": "dataset",
    "output": "output_dir",
    "epsilon": "epsilon_high",
}
"""What people type out of habit, too far in letters from the name it has here."""


@dataclass(frozen=True)
class Setting:
    """One field of one section."""

    name: str
    section: type
    hint: Any
    default: Any
    help: str
    owner: type
    """The class that declares the field, a base of `section`."""


def parse_request(
    argv: Sequence[str],
    sections: Sequence[type],
    *,
    command: str,
    load_recipe: Callable[[str], dict[str, Any]] | None = None,
    reconcile: Callable[[str, dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[type, dict[str, Any]]:
    """What the person set, per section, converted to the declared types; nothing that was left at its default.

    Args:
        argv: `[RECIPE] [--flag value]...`. RECIPE is a YAML file or a name `load_recipe` knows. A flag is written
            with underscores or hyphens, as `--flag value` or `--flag=value`; a switch also as `--flag` and `--no_flag`;
            a list as `a,b`, `a b` or by repeating the flag; a mapping as `k=v,k=v` or JSON. Flags win over the recipe.
        sections: dataclasses; a setting belongs to the first that has a field of its name.
        command: name of the command, for messages.
        load_recipe: settings of a named recipe; None if the command takes YAML files only.
        reconcile: (recipe as named, its settings, the flags' settings) -> the recipe's settings that still hold under
            these flags. Asked only if there is a recipe and everything could be read.
    Raises:
        RequestError: unknown settings (with the nearest names), values of the wrong type, a recipe that cannot be read;
            all of them in one message.
        SystemExit: with code 0, after printing the help, if `-h` or `--help` is given.
    """
    if "-h" in argv or "--help" in argv:
        print(format_help(command, sections))
        raise SystemExit(0)
    settings = collect_settings(sections)
    problems: list[str] = []
    rest = [_readable(token, problems) for token in argv]
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else None
    of_recipe = {} if recipe is None else _read_recipe(recipe, settings, command, load_recipe, problems)
    of_flags = _read_flags(rest, settings, command, problems)
    if len(problems) == 1:
        raise RequestError(problems[0])
    if problems:
        raise RequestError(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))
    if recipe is not None and reconcile is not None:
        of_recipe = reconcile(recipe, of_recipe, of_flags)
    given = {**of_recipe, **of_flags}
    return {
        section: {name: value for name, value in given.items() if settings[name].section is section}
        for section in sections
    }


def _readable(token: str, problems: list[str]) -> str:
    """The argument; if it came in bytes that are no UTF-8, a problem, since no record of the run could name it."""
    try:
        token.encode("utf-8")
    except UnicodeEncodeError:
        problems.append(f"the argument {show_value(token)} is not UTF-8 text. Rename the file, or set a UTF-8 locale.")
        return token.encode("utf-8", "replace").decode()
    return token


def collect_settings(sections: Sequence[type]) -> dict[str, Setting]:
    """Every setting of the sections by name, the first section first."""
    settings: dict[str, Setting] = {}
    for section in sections:
        hints = _resolve_hints(section)
        for item in dataclasses.fields(section):
            if not item.init or item.name in settings:
                continue
            default = item.default
            if default is dataclasses.MISSING and item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            declaring = [base for base in section.__mro__ if item.name in base.__dict__.get("__annotations__", {})]
            settings[item.name] = Setting(
                name=item.name,
                section=section,
                hint=hints.get(item.name, Any),
                default=None if default is dataclasses.MISSING else default,
                help=" ".join(str(item.metadata.get("help", "")).split()),
                owner=declaring[0] if declaring else section,
            )
    return settings


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML file of settings.

    Raises:
        RequestError: missing, no YAML, not a mapping of names to values, or a key given twice; with file and line.
    """
    return {key: value for key, value, _ in _yaml_items(Path(path))}


def format_help(command: str, sections: Sequence[type], *, usage: Sequence[str] | None = None) -> str:
    """All options with type, default and meaning; what psft adds comes before what it takes over from TRL.

    usage: the lines that come first, for a command that takes something else than a recipe.
    """
    of_recipes = (
        f"usage: psft {command} [RECIPE] [--option value]...",
        "",
        "RECIPE is a YAML file or the name of a recipe (psft recipes lists them); options win over it.",
    )
    lines = [
        *(of_recipes if usage is None else usage),
        "A switch may stand alone (--bf16) or be negated (--no_bf16); a list is a,b; a mapping is key=value,key=value.",
    ]
    settings = collect_settings(sections).values()
    groups: dict[tuple[bool, str], list[Setting]] = {}
    for setting in settings:
        is_ours = setting.owner.__module__.partition(".")[0] not in ("trl", "transformers")
        groups.setdefault((is_ours, _title(setting) if is_ours else "From TRL and transformers"), []).append(setting)
    for (_, title), members in sorted(groups.items(), key=lambda group: not group[0][0]):
        lines += ["", f"{title}:"]
        for setting in members:
            default = _show(setting.default)
            accepted = describe(setting.hint, setting.default).removesuffix(" or null")
            lines.append(f"  --{setting.name}  ({accepted if len(accepted) < 60 else 'a word'}; default {default})")
            if setting.help:
                lines.append(f"      {_shorten(setting.help, 112)}")
    return "\n".join(lines)


def _title(setting: Setting) -> str:
    return (setting.owner.__doc__ or setting.owner.__name__).strip().splitlines()[0].rstrip(".")


def _show(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return "none" if value is None else str(value)


def _shorten(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    sentence = text.partition(". ")[0]
    return sentence + "." if len(sentence) < width else text[: width - 3].rsplit(" ", 1)[0] + "..."


def _resolve_hints(section: type) -> dict[str, Any]:
    """The field types as objects; a type that cannot be resolved (its module is not installed) accepts anything."""
    try:
        return typing.get_type_hints(section)
    except Exception:  # whatever evaluating a foreign annotation raises: NameError, TypeError, ImportError, ...
        pass
    hints: dict[str, Any] = {}
    for base in reversed(section.__mro__):
        names = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        for name, annotation in base.__dict__.get("__annotations__", {}).items():
            try:
                hints[name] = eval(annotation, dict(names)) if isinstance(annotation, str) else annotation
            except Exception:
                hints[name] = Any
    return hints


def _read_recipe(
    recipe: str,
    settings: dict[str, Setting],
    command: str,
    load_recipe: Callable[[str], dict[str, Any]] | None,
    problems: list[str],
) -> dict[str, Any]:
    is_file = recipe.endswith((".yaml", ".yml")) or os.sep in recipe or _is_file(recipe)
    try:
        if is_file or load_recipe is None:
            items = [(key, value, f"{shown(recipe)}:{line}: ") for key, value, line in _yaml_items(Path(recipe))]
        else:
            items = [(key, value, f"recipe {recipe}: ") for key, value in load_recipe(recipe).items()]
    except RequestError as error:
        problems.append(str(error))
        return {}
    is_file = is_file or load_recipe is None
    if any(key == PIPELINE for key, _, _ in items):
        problems.append(f"{shown(recipe)} is a pipeline. Run: psft run {shown(recipe)}.")
        return {}
    stage = next((value for key, value, _ in items if key == STAGE), None if is_file else "train")
    if command in STAGES and stage not in (None, command):
        its_command = f"psft {shown(stage, 40)}"
        problems.append(f"recipe {shown(recipe)} is for {its_command}. Run: {its_command} {shown(recipe)}.")
        return {}
    given = {}
    for key, value, where in items:
        if key == STAGE:
            continue
        setting = settings.get(key)
        if setting is None:
            problems.append(f"{where}unknown setting {show_value(key)}. {_nearest(key, settings, '', command)}")
            continue
        try:
            given[key] = convert(value, setting.hint, default=setting.default)
        except BadValue as error:
            problems.append(f"{where}{key}: {show_value(value)} does not fit; {error}.")
    return given


def _is_file(recipe: str) -> bool:
    try:
        return Path(recipe).is_file()
    except (OSError, ValueError):  # a name that is too long, or holds NUL
        return False


def _read_flags(tokens: list[str], settings: dict[str, Setting], command: str, problems: list[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for flag, name, values in _split_flags(tokens, settings, problems):
        setting = settings.get(name)
        if setting is None:
            positive = settings.get(name.removeprefix("no_"))
            if name.startswith("no_") and positive is not None and accepts_bool(positive.hint):
                if values:
                    shown_value = show_value(values[0])
                    problems.append(f"{flag}: takes no value, got {shown_value}. Use --{positive.name} {shown_value}.")
                given[positive.name] = False
                continue
            problems.append(f"unknown option {flag}. {_nearest(name, settings, '--', command)}")
            continue
        expected = describe(setting.hint, setting.default)
        if not values:
            if accepts_bool(setting.hint):
                given[name] = True
            else:
                problems.append(f"{flag}: its value is missing; expected {expected}.")
            continue
        is_repeated = is_list(setting.hint) and isinstance(given.get(name), (list, str))
        joined = values[0] if len(values) == 1 else ",".join(values)
        try:
            value = convert(joined, setting.hint, default=setting.default)
        except BadValue as error:
            problems.append(f"{flag}: {show_value(joined)} does not fit; {error}.")
            continue
        if is_repeated and value is not None:
            value = _as_list(given[name]) + _as_list(value)
        elif is_dict(setting.hint) and isinstance(value, dict) and isinstance(given.get(name), dict):
            value = {**given[name], **value}
        given[name] = value
    return given


def _split_flags(
    tokens: list[str], settings: dict[str, Setting], problems: list[str]
) -> Iterator[tuple[str, str, list[str]]]:
    """Each flag as it was written, its name, and its values; a value where none belongs is a problem."""
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if not token.startswith("--") or token == "--":
            advice = (
                f"Did you mean -{shown(token, 80)}? (A recipe of that name: ./{shown(token, 80)}.)"
                if token.startswith("-") and token != "--"
                else "A recipe comes first, options are --name value."
            )
            problems.append(f"unexpected argument {show_value(token)}. {advice}")
            continue
        flag, sign, inline = token.partition("=")
        name = flag[2:].replace("-", "_")
        values = [inline] if sign else []
        setting = settings.get(name)
        while position < len(tokens) and not tokens[position].startswith("--"):
            many = setting is None or is_list(setting.hint) or is_dict(setting.hint)
            if setting is None and name.startswith("no_"):
                many = False
            if values and not many:
                break
            values.append(tokens[position])
            position += 1
        yield shown(flag, 80), name, values


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _nearest(name: str, settings: dict[str, Setting], prefix: str, command: str) -> str:
    plain = name[:100].lower().replace("-", "_")
    if _SHORT_NAMES.get(plain) in settings:
        return f"Did you mean {prefix}{_SHORT_NAMES[plain]}?"
    close = difflib.get_close_matches(plain, settings, n=3, cutoff=0.7)
    close = close or difflib.get_close_matches(plain, settings, n=1, cutoff=0.5)
    if not close:
        return f"`psft {command} --help` lists all."
    return f"Did you mean {' or '.join(prefix + item for item in close)}?"


def _yaml_items(path: Path) -> list[tuple[str, Any, int]]:
    """Key, value and line of each setting of a YAML file."""
    try:
        text = read_file(path)
    except FileNotFoundError:
        raise RequestError(f"{shown(path)}: no such file. Check the path; `psft recipes` lists the recipes.") from None
    return parse_settings(text, shown(path))
