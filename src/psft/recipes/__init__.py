"""Named settings: one YAML file for each setting of the paper, and the quick start. Keys are those of `psft train`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from psft.errors import RequestError

_DATASETS_FILE = "datasets.yaml"


def names() -> list[str]:
    """Names of the recipes that come with psft, sorted, `quickstart` first."""
    found = (entry.name for entry in files(__name__).iterdir() if entry.name.endswith(".yaml"))
    stems = (name.removesuffix(".yaml") for name in found if name != _DATASETS_FILE)
    return sorted(stems, key=lambda name: (name != "quickstart", name))


def read_text(name_or_path: str) -> str:
    """The YAML text of a recipe by name, or of a file by path.

    Raises:
        RequestError: no recipe of that name and no file there, or the file is not readable text.
    """
    if name_or_path in names():
        return files(__name__).joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = Path(name_or_path).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RequestError(f"no recipe and no file named {name_or_path}{_nearest(name_or_path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"recipe file {path} cannot be read ({error}); give a YAML text file") from error


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """The settings of a recipe by name, or of a YAML file by path, as written there (no defaults filled in).

    Raises:
        RequestError: see `read_text`; also text that is no YAML mapping, or a key that stands there twice.
    """
    import yaml

    text = read_text(name_or_path)
    try:
        settings = yaml.load(text, Loader=_strict_loader())
    except yaml.YAMLError as error:
        raise RequestError(f"recipe {name_or_path} is no valid YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise RequestError(f"recipe {name_or_path} holds a {type(settings).__name__}, not `setting: value` lines")
    return {str(key): value for key, value in settings.items()}


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


def _strict_loader() -> type:
    """`yaml.SafeLoader` that refuses a key given twice, which YAML would let the last one win."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key_node, key in zip((key for key, _ in node.value), seen, strict=True):
                if seen.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            return super().construct_mapping(node, deep=deep)

    return StrictLoader
