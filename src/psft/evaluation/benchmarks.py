"""What a benchmark is: where its data lie, how a row becomes a prompt, how answers are sampled and graded.

A suite is a YAML mapping, `defaults` for all and `benchmarks` by name, each with the keys of `Benchmark`; or, with
`use: SUITE/NAME`, a registered benchmark of which some keys are changed. Everything wrong with a
suite is reported together.

    benchmarks:
      aime24: {use: math/aime24, k: 8}
      mine: {kind: math, file: mine.jsonl, k: 4, fields: {question: problem, gold: answer}}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from psft.data.gym import PREFIX as GYM_PREFIX
from psft.errors import RequestError, shown

KINDS: dict[str, frozenset[str]] = {
    "math": frozenset({"question", "gold"}),
    "choice": frozenset({"question", "options"}),
    "ifeval": frozenset({"question", "instruction_id_list", "kwargs"}),
    "reasoning_gym": frozenset({"question", "gym_source", "gym_index"}),
}
"""Kind of item (and name of its grader) -> the fields its rows must have."""
GOLD_OF_CHOICE = ("gold_letter", "gold_label", "gold_index", "gold_flags")
"""How a multiple-choice row may say which option is right; exactly one of them is named.

gold_letter: A, B, ...; gold_label: one of `option_labels`; gold_index: counts from 0, or the word `first`; gold_flags:
a list with a 1 (or true) at the right one.
"""
_REGISTRIES = ("math", "ood")
"""Suites whose benchmarks are found by name alone."""
_OPTIONAL_FIELDS = frozenset({"id", "option_labels", *GOLD_OF_CHOICE})


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. temperature 0: the likeliest token, always; top_k 0: no such limit; max_tokens: of an
    answer, beyond which it counts as truncated."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    max_tokens: int = 10_240

    def problems(self) -> list[str]:
        """What is wrong with the values, in words."""
        found = []
        if not 0 <= self.temperature <= 100:
            found.append(f"temperature={self.temperature:g} must be 0 or more")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p:g} must be above 0, at most 1")
        if self.top_k < 0:
            found.append(f"top_k={self.top_k} must be 0 (no limit) or more")
        if self.max_tokens < 1:
            found.append(f"max_tokens={self.max_tokens} must be 1 or more")
        return found


PRESETS = {
    "paper": Sampling(),
    "paper-ifeval": Sampling(max_tokens=4_096),
    "greedy": Sampling(temperature=0.0, top_p=1.0),
}
"""Named settings. Paper, section 4.1: 10,240 tokens (IFEval 4,096), top-p 0.95, temperature 0.7."""


@dataclass(frozen=True)
class Hub:
    """The same data on the Hugging Face hub. rows, fields: where they differ from the file's."""

    id: str
    split: str
    config: str | None = None
    rows: int | None = None
    fields: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Benchmark:
    """One set of items.

    file: under the data folder; or `reasoning-gym:TASK?size=32&seed=1`, whose rows are made. rows, sha256: what it is
    expected to have; None = not checked. fields: our name -> the row's, dotted into objects (and through lists of
    objects); `id` may be a list, joined by `-`. template: `{question}`, and for multiple choice `{options}` and
    `{letters}`. shuffle: options in an order drawn for each item. grader: settings of the grader. distinct: of rows
    with one question only the first. limit: only the first items.
    """

    name: str
    kind: str
    file: str
    title: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    sha256: str | None = None
    hub: Hub | None = None
    how_to_get: str = ""
    system_prompt: str | None = None
    template: str = "{question}"
    k: int = 1
    sampling: Sampling = PRESETS["paper"]
    shuffle: bool = False
    grader: Mapping[str, Any] = field(default_factory=dict)
    distinct: bool = False
    limit: int | None = None
    folder: Path | None = None
    """Of the suite file that names it; the data are looked for there, too."""

    @property
    def shown_name(self) -> str:
        return self.title or self.name

    @property
    def is_made(self) -> bool:
        """Whether its items are made by reasoning-gym and lie in no file."""
        return self.file.startswith(GYM_PREFIX)


@dataclass(frozen=True)
class Suite:
    """Benchmarks under a name."""

    name: str
    benchmarks: tuple[Benchmark, ...]


def suite_names() -> list[str]:
    """Names of the suites that come with psft."""
    found = files("psft.evaluation.suites").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in found if entry.name.endswith(".yaml"))


@lru_cache
def packaged_suite(name: str) -> Suite:
    """A suite that comes with psft.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in suite_names():
        raise RequestError(f"no suite named {shown(name)}.{did_you_mean(name, suite_names())}")
    import yaml

    text = files("psft.evaluation.suites").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return make_suite(name, yaml.safe_load(text), where=f"suite {name}")


def read_suite(path: Path) -> Suite:
    """A suite of the user's own from a YAML file, named after it; its data are looked for beside it, too.

    Raises:
        RequestError: it cannot be read, is no YAML, or `make_suite` refuses it.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {shown(str(error))}. Check its name and rights.") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: not valid YAML ({shown(' '.join(str(error).split()))}). Correct it.") from error
    return make_suite(path.stem, content, where=str(path), folder=path.parent)


def registered_benchmark(name: str) -> Benchmark | None:
    """`math/aime24`, or `aime24` of whichever suite has it first; None: no such."""
    suite, slash, own = name.rpartition("/")
    for place in [suite] if slash else _REGISTRIES:
        if place in suite_names():
            for benchmark in packaged_suite(place).benchmarks:
                if benchmark.name == own:
                    return benchmark
    return None


def registered_names() -> list[str]:
    """`math/aime24` and so on, of every benchmark that is found by its name alone, too."""
    return [f"{suite}/{benchmark.name}" for suite in _REGISTRIES for benchmark in packaged_suite(suite).benchmarks]


def make_suite(name: str, content: Any, *, where: str, folder: Path | None = None) -> Suite:
    """The suite a mapping describes.

    Args:
        where: what messages call it. folder: of the file it was read from.
    Raises:
        RequestError: unknown keys (with the nearest), missing or wrong values; all in one message.
    """
    problems: list[str] = []
    if not isinstance(content, Mapping) or not isinstance(content.get("benchmarks"), Mapping):
        raise RequestError(f"{where}: a suite needs `benchmarks:`, a mapping of names to settings. Add it.")
    for key in set(content) - {"benchmarks", "defaults"}:
        problems.append(f"unknown key {shown(key, 40)!r}.{did_you_mean(str(key), ['benchmarks', 'defaults'])}")
    defaults = content.get("defaults") or {}
    if not isinstance(defaults, Mapping):
        problems.append("`defaults` must be a mapping")
        defaults = {}
    found = []
    for key, entry in content["benchmarks"].items():
        made = _make_benchmark(str(key), entry, defaults, folder, problems)
        found += [made] if made is not None else []
    if not found and not problems:
        problems.append("`benchmarks` is empty")
    if problems:
        raise RequestError(f"{where}: " + "; ".join(problems) + ". Correct it.")
    return Suite(name, tuple(found))


def _make_benchmark(
    name: str, entry: Any, defaults: Mapping[str, Any], folder: Path | None, problems: list[str]
) -> Benchmark | None:
    if not isinstance(entry, Mapping):
        problems.append(f"{name}: must be a mapping of settings")
        return None
    before = len(problems)
    settings = {**defaults, **entry}
    base = None
    if "use" in settings:
        wanted = str(settings.pop("use"))
        base = registered_benchmark(wanted)
        if base is None:
            known = did_you_mean(wanted, registered_names())
            problems.append(f"{name}: no registered benchmark {shown(wanted, 40)!r}.{known}")
            return None
    known_keys = [f.name for f in fields(Benchmark) if f.name not in ("name", "folder")]
    for key in settings:
        if key not in known_keys:
            problems.append(f"{name}: unknown key {shown(key, 40)!r}.{did_you_mean(str(key), known_keys)}")
    if len(problems) > before:
        return None
    values = {key: _convert(name, key, value, problems) for key, value in settings.items()}
    if len(problems) > before:
        return None
    if base is not None:
        made = replace(base, name=name, **values)
    else:
        required = [f.name for f in fields(Benchmark) if f.default is MISSING and f.default_factory is MISSING]
        missing = [key for key in required if key not in values and key != "name"]
        if missing:
            problems.append(f"{name}: {' and '.join(missing)} missing")
            return None
        made = Benchmark(name=name, folder=folder, **values)
    problems += [f"{name}: {problem}" for problem in _problems(made)]
    return made


def _convert(name: str, key: str, value: Any, problems: list[str]) -> Any:
    """A YAML value as `Benchmark` holds it."""
    wanted: dict[str, type | tuple[type, ...]] = {
        "k": int, "rows": int, "limit": int, "shuffle": bool, "distinct": bool,
        "kind": str, "file": str, "template": str, "title": str,
        "sha256": str, "how_to_get": str, "system_prompt": (str, type(None)), "fields": Mapping, "grader": Mapping,
    }  # fmt: skip
    if key == "sampling":
        return _sampling(name, value, problems)
    if key == "hub":
        known = [f.name for f in fields(Hub)]
        if not isinstance(value, Mapping) or not {"id", "split"} <= set(value) or not set(value) <= set(known):
            problems.append(f"{name}: hub must be a mapping with id and split, and perhaps config, rows, fields")
            return None
        return Hub(**value)
    is_wrong = not isinstance(value, wanted[key]) or (wanted[key] is int and isinstance(value, bool))
    if is_wrong:
        problems.append(f"{name}: {key} is {shown(repr(value), 60)}, which is of the wrong type")
    return value


def _sampling(name: str, value: Any, problems: list[str]) -> Sampling:
    settings: dict[Any, Any] | None = (
        {"preset": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else None
    )
    if settings is None:
        problems.append(f"{name}: sampling is {shown(repr(value), 60)}; give a preset or a mapping")
        return PRESETS["paper"]
    preset = str(settings.pop("preset", "paper"))
    if preset not in PRESETS:
        problems.append(f"{name}: no sampling preset {preset!r}.{did_you_mean(preset, list(PRESETS))}")
        return PRESETS["paper"]
    known = [f.name for f in fields(Sampling)]
    for key, item in settings.items():
        if key not in known:
            problems.append(f"{name}: sampling has no {shown(key, 40)!r}.{did_you_mean(str(key), known)}")
        elif isinstance(item, bool) or not isinstance(item, int | float):
            problems.append(f"{name}: sampling {key} is {shown(repr(item), 40)}, not a number")
        elif key in ("top_k", "max_tokens") and not isinstance(item, int):
            problems.append(f"{name}: sampling {key} is {item:g}, not a whole number")
    if problems:
        return PRESETS[preset]
    return replace(PRESETS[preset], **settings)


def _problems(made: Benchmark) -> list[str]:
    """What contradicts itself in a benchmark whose values have the right types."""
    found = list(made.sampling.problems())
    if made.kind not in KINDS:
        return [*found, f"unknown kind {made.kind!r}.{did_you_mean(made.kind, list(KINDS))}"]
    for mapping in (made.fields, (made.hub.fields if made.hub else None) or made.fields):
        known = KINDS[made.kind] | _OPTIONAL_FIELDS
        found += [
            f"fields has no {shown(key, 40)!r}.{did_you_mean(key, sorted(known))}" for key in set(mapping) - known
        ]
        found += [f"fields lacks {key!r}" for key in sorted(KINDS[made.kind] - set(mapping))]
        golds = [key for key in GOLD_OF_CHOICE if key in mapping]
        if made.kind == "choice" and len(golds) != 1:
            found.append(f"fields must name exactly one of {', '.join(GOLD_OF_CHOICE)}")
        if "gold_label" in mapping and "option_labels" not in mapping:
            found.append("fields has gold_label without option_labels")
    if made.k < 1:
        found.append(f"k={made.k} must be 1 or more")
    if made.limit is not None and made.limit < 1:
        found.append(f"limit={made.limit} must be 1 or more")
    if "{question}" not in made.template:
        found.append("template lacks {question}")
    if made.kind == "choice" and "{options}" not in made.template:
        found.append("template lacks {options}")
    return list(dict.fromkeys(found))


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """` Did you mean X?`, or all that is known where nothing is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."
