"""Named settings: one YAML file for each setting of the paper, and the quick starts. Keys are those of the command that
a recipe is for: `psft train`, or the one that its key `stage` names.

A recipe may come from anywhere. It is data: no tag makes a Python object, aliases cannot multiply a few lines into
gigabytes, and its size and depth are bounded, so that reading one ends in settings or in one `RequestError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from psft.errors import RequestError, shown

_DATASETS_FILE = "datasets.yaml"
STAGE = "stage"
"""The one key that is no setting: the command a recipe is for, `train` where it has none."""
STAGES = ("train", "dpo", "grpo")
PIPELINE = "pipeline"
"""The key that makes a file a pipeline, which `psft run` takes and no other command (`psft.pipelines`)."""
MAX_BYTES = 1 << 16  # of a recipe file; the longest of ours has 2 KB, and YAML is read slowly
MAX_VALUES = 10_000  # of a recipe with every alias written out
MAX_DEPTH = 32  # lists and mappings inside each other; PyYAML takes ever longer with depth, then runs out of stack


def names() -> list[str]:
    """Names of the recipes that come with psft, sorted, `quickstart` first."""
    found = (entry.name for entry in files(__name__).iterdir() if entry.name.endswith(".yaml"))
    stems = (name.removesuffix(".yaml") for name in found if name != _DATASETS_FILE)
    return sorted(stems, key=lambda name: (name != "quickstart", name))


def read_text(name_or_path: str) -> str:
    """The YAML text of a recipe by name, or of a file by path.

    Raises:
        RequestError: no recipe of that name and no file there, or the file is not readable text of a recipe's size.
    """
    if name_or_path in names():
        return files(__name__).joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    try:
        return read_file(name_or_path)
    except FileNotFoundError as error:
        raise RequestError(f"no recipe and no file named {shown(name_or_path)}{_nearest(name_or_path)}") from error


def read_file(path: str | Path) -> str:
    """The text of a recipe file.

    Raises:
        FileNotFoundError: there is none.
        RequestError: it is no file, too large, or not UTF-8 text.
    """
    where = shown(path)
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RequestError(f"recipe file {where} cannot be read ({error.strerror}); give a YAML text file") from error
    except (ValueError, RuntimeError) as error:  # NUL in the name; no such ~user
        raise RequestError(f"recipe file {where} cannot be read ({shown(error)}); give a YAML text file") from error
    if len(raw) > MAX_BYTES:
        raise RequestError(
            f"recipe file {where} cannot be read (more than {MAX_BYTES >> 10} KiB); give a YAML text file"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"recipe file {where}:{line} cannot be read (byte 0x{raw[error.start]:02x} is not UTF-8); give a YAML text "
            "file"
        ) from error


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """The settings of a recipe by name, or of a YAML file by path, as written there (no defaults filled in).

    Raises:
        RequestError: see `read_text` and `parse_settings`.
    """
    items = parse_settings(read_text(name_or_path), f"recipe {shown(name_or_path)}")
    return {key: value for key, value, _ in items}


def stage_of(name_or_path: str) -> str:
    """The command a recipe is for; `run` for a pipeline.

    Raises:
        RequestError: it cannot be read, or names a command that is none.
    """
    recipe = load_recipe(name_or_path)
    stage = recipe.get(STAGE, "train")
    if PIPELINE in recipe:
        return "run"
    if stage not in STAGES:
        raise RequestError(f"recipe {shown(name_or_path)}: {STAGE}={shown(stage, 40)} is none of {', '.join(STAGES)}.")
    return str(stage)


def maker_of(folder: str) -> tuple[str, str] | None:
    """The command and the recipe that leave their model in `folder`, or None."""
    for name in names():
        if load_recipe(name).get("output_dir") == folder:
            return stage_of(name), name
    return None


def parse_settings(text: str, where: str) -> list[tuple[str, Any, int]]:
    """Key, value and line of each `setting: value` of YAML text.

    Args:
        where: what the text is called in messages.
    Raises:
        RequestError: text that is no YAML mapping, a key that stands there twice, a tag that YAML's plain types do not
            have, nesting without end, or aliases that multiply into more than MAX_VALUES values.
    """
    node, content = _construct(text, where)
    if content is None:
        return []
    if not isinstance(content, dict):
        raise RequestError(f"{where} holds a {type(content).__name__}, not `setting: value` lines. Correct it.")
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value if isinstance(key.value, str)}
    for key in content:
        if not isinstance(key, str):
            raise RequestError(f"{where}: the key {shown(repr(key), 40)} is no setting's name. Correct it.")
    return [(key, value, lines.get(key, 1)) for key, value in content.items()]


def parse_value(text: str) -> Any:
    """What YAML text stands for, by the rules of a recipe.

    Raises:
        RequestError: see `parse_settings`.
    """
    return _construct(text, "the value")[1]


def _construct(text: str, where: str) -> tuple[Any, Any]:
    """The root node of YAML text and what it stands for; both None if the text is empty."""
    import yaml

    try:
        _check_depth(yaml.parse(text, Loader=yaml.SafeLoader), where)
        loader = _strict_loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _check_size(node, where)
        return node, loader.construct_document(node)
    except yaml.YAMLError as error:
        raise RequestError(f"{_place(error, text, where)}: no valid YAML: {_problem(error)}. Correct it.") from error


def describe(name: str) -> str:
    """One line about a recipe: its first comment."""
    first = read_text(name).lstrip().splitlines()[:1]
    return first[0].lstrip("# ").strip() if first and first[0].startswith("#") else ""


def known_dataset(dataset: str, split: str) -> tuple[int, str] | None:
    """Rows of a hub data set's split and where that number is from, or None if the table does not hold it."""
    import yaml

    table = yaml.safe_load(files(__name__).joinpath(_DATASETS_FILE).read_text(encoding="utf-8"))
    entry = table.get(f"{dataset}:{split}")
    return (int(entry["num_rows"]), str(entry["source"])) if entry else None


def _nearest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; `psft recipes` lists what there is"


def _place(error: Any, text: str, where: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{where}:{mark.line + 1}"
    position = getattr(error, "position", None)  # of a character that YAML does not have
    return where if position is None else f"{where}:{text.count(chr(10), 0, position) + 1}"


def _problem(error: Any) -> str:
    if getattr(error, "position", None) is not None:
        return f"the character U+{error.character:04X} cannot stand there"
    return shown(" ".join(str(getattr(error, "problem", None) or error).split()))


def _check_depth(events: Iterable[Any], where: str) -> None:
    """Raises RequestError where values stand inside each other more than MAX_DEPTH times, or go beyond MAX_VALUES."""
    import yaml

    depth = 0
    for number, event in enumerate(events):
        if number > 2 * MAX_VALUES:  # a list or mapping is two events
            raise _too_many(where)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1
            raise RequestError(f"{where}:{line}: nested too deeply. Settings are `name: value` lines; correct it.")


def _check_size(root: Any, where: str) -> None:
    """Raises RequestError if the document, with each alias written out, is endless or has more than MAX_VALUES values.

    Counted on the graph of nodes, where what an alias stands for is there once.
    """
    sizes: dict[int, int] = {}
    path: set[int] = set()
    waiting = [(root, False)]
    while waiting:
        node, is_left = waiting.pop()
        below = _children(node)
        if is_left:
            path.discard(id(node))
            sizes[id(node)] = min(1 + sum(sizes[id(child)] for child in below), MAX_VALUES + 1)
        elif id(node) not in sizes:
            path.add(id(node))
            waiting.append((node, True))
            if any(id(child) in path for child in below):
                raise RequestError(f"{where}:{node.start_mark.line + 1}: an alias stands inside itself. Correct it.")
            waiting.extend((child, False) for child in below)
    if sizes[id(root)] > MAX_VALUES:
        raise _too_many(where)


def _too_many(where: str) -> RequestError:
    return RequestError(f"{where} has more than {MAX_VALUES} values once its aliases are written out. Shorten it.")


def _children(node: Any) -> list[Any]:
    if not isinstance(node.value, list):
        return []
    return [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]


def _strict_loader() -> Any:
    """`yaml.SafeLoader` that refuses a key given twice, which YAML would let the last one win, and says what it cannot
    read with the line it stands in."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                value = super().construct_object(node, deep=deep)
            except (
                ValueError,
                TypeError,
                KeyError,
                AttributeError,
                OverflowError,
            ) as error:  # 2024-99-99, !!bool maybe
                kind = node.tag.rpartition(":")[2]
                message = f"{shown(node.value, 40)} is no {kind}"
                raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from error
            if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                message = "a lone surrogate, a character that no encoding has"
                raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
            return value

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            lines: dict[Any, int] = {}
            for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                is_merge = key_node.tag == "tag:yaml.org,2002:merge"
                key = "<<" if is_merge else self.construct_object(key_node, deep=True)
                if isinstance(key, (list, dict, set)):
                    break  # PyYAML says that no key can be that
                if key in lines:
                    message = f"{shown(key, 40)} is given twice, first in line {lines[key]}"
                    raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
                lines[key] = key_node.start_mark.line + 1
            return super().construct_mapping(node, deep=deep)

    def refuse(loader: Any, node: Any) -> None:
        message = f"the tag {shown(node.tag, 80)} is none of YAML's plain types; nothing else is made from a recipe"
        raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)

    StrictLoader.add_constructor(None, refuse)
    return StrictLoader
