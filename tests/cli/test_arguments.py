"""Laws of a request: three spellings of one setting agree, and everything wrong is reported together."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Optional, Union

import pytest

from psft.cli.arguments import collect_settings, format_help, parse_request
from psft.config import DataArguments, ModelArguments, PSFTFields
from psft.errors import RequestError
from psft.recipes import load_recipe


class Strategy(str, Enum):
    NO = "no"
    STEPS = "steps"


@dataclass
class Options:
    """Options of a test."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    max_steps: int = -1
    limit: Optional[int] = None  # noqa: UP045 - old spellings must work too
    budget: "int | str" = "auto"
    bf16: bool | None = None
    shuffle: bool = True
    names: list[str] | None = None
    sizes: list[int] | None = None
    report_to: Union[None, str, list[str]] = "none"  # noqa: UP007
    columns: dict[str, str] | None = None
    scheduler: dict | str | None = None
    switches: dict[str, bool] | None = None
    strategy: Strategy | str = "no"
    mode: Literal["fast", "exact"] = "fast"
    title: str | None = None
    token: str | bool | None = None
    folder: str = "runs"
    derived: int = field(default=0, init=False)


@dataclass
class More:
    """More options."""

    max_steps: int = 0
    extra: float | None = None


def parse(*argv: str, sections: tuple[type, ...] = (Options, More), **settings: Any) -> dict[type, dict[str, Any]]:
    return parse_request(list(argv), sections, command="train", **settings)


def parsed(*argv: str) -> dict[str, Any]:
    return parse(*argv)[Options]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learning_rate", "1e-6"], {"learning_rate": 1e-6}),
        (["--learning-rate=1e-6"], {"learning_rate": 1e-6}),
        (["--learning_rate", "inf"], {"learning_rate": math.inf}),
        (["--learning_rate", "-1"], {"learning_rate": -1.0}),
        (["--learning_rate", "1", "--learning_rate", "2"], {"learning_rate": 2.0}),
        (["--max_steps", "1e3"], {"max_steps": 1000}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--limit", "none"], {"limit": None}),
        (["--limit", "3"], {"limit": 3}),
        (["--budget", "auto"], {"budget": "auto"}),
        (["--budget", "2048"], {"budget": 2048}),
        (["--bf16"], {"bf16": True}),
        (["--bf16", "--max_steps", "2"], {"bf16": True, "max_steps": 2}),
        (["--bf16", "false"], {"bf16": False}),
        (["--no-bf16", "--no_shuffle"], {"bf16": False, "shuffle": False}),
        (["--shuffle=no"], {"shuffle": False}),
        (["--names", "a", "--names", "b"], {"names": ["a", "b"]}),
        (["--names", "a", "b"], {"names": ["a", "b"]}),
        (["--names", "a,b"], {"names": ["a", "b"]}),
        (["--names", '["a,b"]'], {"names": ["a,b"]}),
        (["--sizes", "1,2", "3"], {"sizes": [1, 2, 3]}),
        (["--report_to", "none"], {"report_to": "none"}),
        (["--report_to", "wandb", "tensorboard"], {"report_to": ["wandb", "tensorboard"]}),
        (["--columns", "question=q,answer=a"], {"columns": {"question": "q", "answer": "a"}}),
        (["--columns", "question=q", "answer=a=b"], {"columns": {"question": "q", "answer": "a=b"}}),
        (["--columns", '{"question": "q"}'], {"columns": {"question": "q"}}),
        (["--scheduler", '{"num_cycles": 2}'], {"scheduler": {"num_cycles": 2}}),
        (["--scheduler", "num_cycles=2"], {"scheduler": {"num_cycles": 2}}),
        (["--scheduler", "file.json"], {"scheduler": "file.json"}),
        (["--switches", "a=yes"], {"switches": {"a": True}}),
        (["--strategy", "steps"], {"strategy": "steps"}),
        (["--mode", "exact"], {"mode": "exact"}),
        (["--title", "a = b, c"], {"title": "a = b, c"}),
        (["--title=--x"], {"title": "--x"}),
        (["--token"], {"token": True}),
        (["--token", "abc"], {"token": "abc"}),
        ([], {}),
    ],
)
def test_flags_become_the_declared_types(argv, expected):
    """Goes red if a converter is dropped, or if text is tried before the narrower types."""
    given = parsed(*argv)
    assert given == expected
    assert {name: type(value) for name, value in given.items()} == {name: type(v) for name, v in expected.items()}


def test_yaml_and_flags_spell_the_same_values(tmp_path):
    """Goes red if YAML values skip the conversion: YAML 1.1 reads 1e-6 as text, `no` as false, 5 as an int."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "learning_rate: 1e-6\nmax_steps: 5\nlimit: null\nbudget: 2048\nbf16: false\nnames: [a, b]\nreport_to: none\n"
        "columns: {question: q}\nscheduler: {num_cycles: 2}\nstrategy: no\ntitle: 2024\nextra: 5\n"
    )
    flags = (
        "--learning_rate 1e-6 --max_steps 5 --limit null --budget 2048 --bf16 false --names a b --report_to none "
        "--columns question=q --scheduler num_cycles=2 --strategy no --title 2024 --extra 5"
    )
    from_yaml = parse(str(path))
    assert from_yaml == parse(*flags.split())
    assert isinstance(from_yaml[More]["extra"], float) and from_yaml[Options]["learning_rate"] == 1e-6


def test_flags_win_over_the_recipe(tmp_path):
    """Goes red if the recipe is applied last."""
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: .inf\nmax_steps: 5\nnames: [a]\n")
    given = parsed(str(path), "--max_steps", "7", "--names", "b")
    assert given == {"learning_rate": math.inf, "max_steps": 7, "names": ["b"]}


def test_a_named_recipe_comes_from_the_loader():
    """Goes red if names are looked for as files."""
    given = parse("quick", load_recipe=lambda name: {"title": name, "learning_rate": "1e-6"})[Options]
    assert given == {"title": "quick", "learning_rate": 1e-6}


def test_a_recipe_is_reconciled_with_the_flags():
    """Goes red if it is asked without a recipe or with unread values, or if it can touch a flag."""
    asked = []

    def reconcile(recipe: str, of_recipe: dict[str, Any], of_flags: dict[str, Any]) -> dict[str, Any]:
        asked.append((recipe, dict(of_recipe), dict(of_flags)))
        return {"title": "kept"}

    how: dict[str, Any] = {
        "load_recipe": lambda name: {"learning_rate": "1e-6", "max_steps": 2},
        "reconcile": reconcile,
    }
    assert parse("quick", "--max_steps", "3", **how)[Options] == {"title": "kept", "max_steps": 3}
    assert asked == [("quick", {"learning_rate": 1e-6, "max_steps": 2}, {"max_steps": 3})]
    assert parse("--max_steps", "3", **how)[Options] == {"max_steps": 3} and len(asked) == 1
    with pytest.raises(RequestError):
        parse("quick", "--max_stpes", "3", **how)
    assert len(asked) == 1


def test_a_setting_belongs_to_the_first_section_that_has_it():
    """Goes red if later sections win, or if a section without settings is left out."""
    assert parse("--max_steps", "3") == {Options: {"max_steps": 3}, More: {}}
    assert parse("--max_steps", "3", sections=(More, Options)) == {More: {"max_steps": 3}, Options: {}}


def test_all_problems_come_together(tmp_path):
    """Goes red if the first problem raises."""
    path = tmp_path / "recipe.yaml"
    path.write_text("max_steps: 3\nlerning_rate: 1\nshuffle: maybe\n")
    with pytest.raises(RequestError) as caught:
        parse(str(path), "--colums", "a=b", "--limit", "many", "--strategy", "step", "stray", "--folder")
    message = str(caught.value)
    assert message.startswith("7 problems:") and len(message.splitlines()) == 8
    assert f"{path}:2: unknown setting 'lerning_rate'. Did you mean learning_rate?" in message
    assert f"{path}:3: shuffle: 'maybe' does not fit; expected true or false." in message
    assert "unknown option --colums. Did you mean --columns?" in message
    assert "--limit: 'many' does not fit; expected a whole number or null." in message
    assert "--strategy: 'step' does not fit; expected one of no, steps (did you mean steps?)." in message
    assert "unexpected argument 'stray'" in message
    assert "--folder: its value is missing; expected text." in message


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate", "fast"],
        ["--learning_rate", "nan"],
        ["--learning_rate", "null"],
        ["--max_steps", "1.5"],
        ["--max_steps", "true"],
        ["--max_steps", "inf"],
        ["--budget", "lots"],
        ["--shuffle", "maybe"],
        ["--sizes", "1,x"],
        ["--columns", "question"],
        ["--columns", "=q"],
        ["--columns", '{"question": '],
        ["--switches", "a=perhaps"],
        ["--strategy", "epochs"],
        ["--mode", "slow"],
        ["--no_bf16", "--no_folder"],
        ["--derived", "1"],
        ["--max_steps"],
        ["-max_steps", "3"],
        ["--max_steps", "3", "4"],
    ],
)
def test_what_does_not_fit_is_refused_on_one_line(argv):
    """Goes red if a converter accepts anything, or if the message does not name the option and its value."""
    with pytest.raises(RequestError) as caught:
        parsed(*argv)
    message = str(caught.value)
    assert "problems" not in message or argv[0] == "-max_steps"
    assert argv[-1].split("=")[-1][:5].strip("-") in message or argv[0] in message


def test_an_unknown_option_far_from_all_points_to_the_help():
    """Goes red if an empty list of near names is printed."""
    with pytest.raises(RequestError, match=r"unknown option --zzqqxx. `psft train --help` lists all"):
        parsed("--zzqqxx", "3")


def test_a_habitual_short_name_is_understood():
    """Goes red if only the letters count: lr is nearer to lora_r than to learning_rate."""
    with pytest.raises(RequestError, match=r"unknown option --lr. Did you mean --learning_rate\?"):
        parsed("--lr", "1e-6")


def test_a_folder_named_like_a_recipe_is_not_read(tmp_path, monkeypatch):
    """Goes red if any existing path counts as a file: runs/ or quickstart/ may lie beside the person."""
    (tmp_path / "quick").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse("quick", load_recipe=lambda name: {"title": name})[Options] == {"title": "quick"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_steps: 1\n\nmax_steps: 2\n", r":3: .*max_steps is given twice, first in line 1"),
        ("columns:\n  a: b\n  a: c\n", r":3: .*a is given twice, first in line 2"),
        ("max_steps: [1\n", r":2: no valid YAML"),
        ("- 1\n", "holds a list, not `setting: value` lines"),
        ("names: {a: 1}\n", r":1: names: .* does not fit; expected a list"),
        ("title: true\n", r":1: title: True does not fit; expected text or null"),
    ],
)
def test_a_recipe_that_cannot_be_used_names_file_and_line(tmp_path, text, reason):
    """Goes red if PyYAML's last-wins for doubled keys, or its exceptions, come through."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=reason):
        parsed(str(path))


def test_a_missing_recipe_is_named_and_an_empty_one_is_fine(tmp_path):
    """Goes red if FileNotFoundError comes through, or None is taken for a mapping."""
    with pytest.raises(RequestError, match="absent.yaml: no such file"):
        parsed(str(tmp_path / "absent.yaml"))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parsed(str(tmp_path / "empty.yaml")) == {}


def test_help_names_every_option_with_its_default(capsys):
    """Goes red if a section or a default is left out, or --help does not stop."""
    text = format_help("train", (Options, More))
    for name in collect_settings((Options, More)):
        assert f"--{name} " in text
    assert "default 2e-05" in text and "Peak learning rate." in text and "--derived" not in text
    with pytest.raises(SystemExit) as stopped:
        parse("--nonsense", "--help")
    assert stopped.value.code == 0 and "Peak learning rate." in capsys.readouterr().out


def test_every_psft_setting_can_be_given_as_a_flag():
    """Goes red if a field of psft.config gets a type the command line cannot read."""
    sections = (PSFTFields, DataArguments, ModelArguments)
    samples = {bool: "true", int: "3", float: "0.5", str: "word", list[str]: "a,b", dict[str, str]: "a=b"}
    samples |= {dict[str, Any]: "a=2.5,b=linear"}
    for name, setting in collect_settings(sections).items():
        texts = [text for kind, text in samples.items() if kind in _members(setting.hint)]
        assert texts, f"{name}: {setting.hint}"
        for text in texts:
            text = "auto" if text == "word" and setting.default == "auto" else text
            assert name in parse(f"--{name}", text, sections=sections)[setting.section]


def test_settings_of_trl_are_read_by_their_annotations():
    """Goes red if string annotations, enums or unions of transformers are not resolved. Loads trl (seconds)."""
    trl = pytest.importorskip("trl")
    argv = (
        "--learning_rate 1e-6 --max_steps 16 --bf16 false --report_to none --lr_scheduler_type constant_with_warmup "
        "--gradient_checkpointing no --eval_strategy steps --eval_steps 4 --optim adamw_torch --save_strategy no "
        "--lr_scheduler_kwargs num_cycles=2 --logging_steps 1 --output_dir out --warmup_steps 3 --use_cpu"
    )
    given = parse(*argv.split(), sections=(trl.SFTConfig,))[trl.SFTConfig]
    assert given["bf16"] is False and given["gradient_checkpointing"] is False and given["report_to"] == "none"
    assert given["lr_scheduler_kwargs"] == {"num_cycles": 2} and given["save_strategy"] == "no"
    config = trl.SFTConfig(**given)
    assert (
        config.learning_rate == 1e-6 and config.max_steps == 16 and config.lr_scheduler_type == "constant_with_warmup"
    )
    with pytest.raises(RequestError, match="did you mean cosine"):
        parse("--lr_scheduler_type", "cosin", sections=(trl.SFTConfig,))


def _members(hint: Any) -> list[Any]:
    from psft.cli.values import alternatives

    return alternatives(hint)


HOSTILE_VALUES = [
    ("title: 0x" + "f" * 5000, r":1: title: <a whole number of 20000 bits> does not fit; expected text"),
    ("learning_rate: 0x" + "f" * 500, r":1: learning_rate: .* does not fit; expected a number"),
    ("title: 2024-99-99", r":1: no valid YAML: 2024-99-99 is no timestamp"),
    ("title: !!int x", r":1: no valid YAML: x is no int"),
    ("max_steps: 1\ntitle: !!bool x", r":2: no valid YAML: x is no bool"),
    ("title: !!timestamp x", r":1: no valid YAML: x is no timestamp"),
    ("title: " + "9" * 5000, r":1: no valid YAML: 9{20}.* is no int"),
    ("names: !!map [1]", r":1: no valid YAML: expected a mapping node"),
    ("a: !!python/object/apply:os.system [id]", r":1: no valid YAML: the tag tag:yaml.org,2002:python/object/apply"),
    ("!!python/object/apply:os.system [id]", r":1: no valid YAML: the tag"),
    ("? !!python/object/apply:os.system [id]\n: 1", r":1: no valid YAML: the tag"),
    ("names: [a, {b: !!python/name:os.system }]", r":1: no valid YAML: the tag"),
    ("names: " + "[" * 10_000, r":1: nested too deeply"),
    ("a:\n " + "- " * 500, r":2: nested too deeply"),
    ("names: &x [*x]", r":1: an alias stands inside itself"),
    ("columns: &x {a: *x}", r":1: an alias stands inside itself"),
    ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n", "more than 10000 values"),
    ("a: &a {x: 1, y: 2}\n", "more than 10000 values"),
    ("names: [" + "a, " * 20_000 + "]", "more than 10000 values"),
    ('title: "\\ud800"', r":1: no valid YAML: a lone surrogate"),
    ("title: a\ntitle2: \x00", r":2: no valid YAML: the character U\+0000 cannot stand there"),
    ("1: a", "the key 1 is no setting's name"),
    ("columns: {1: a, '1': b}", r":1: columns: .* does not fit; one of its keys is given twice"),
    ("{a: 1, a: 2}", r":1: no valid YAML: a is given twice"),
    ("#" * (1 << 17), "more than 64 KiB"),
    ("%s: 1" % ("x\u202e" * 200), r"unknown setting 'x\\u202ex"),
]


@pytest.mark.parametrize(("text", "reason"), HOSTILE_VALUES, ids=[text[:25] for text, _ in HOSTILE_VALUES])
def test_a_hostile_recipe_is_one_clear_error(text, reason, tmp_path):
    """Goes red if an exception of PyYAML or int() comes through, a tag makes an object, or aliases multiply.

    The first of each kind were found by tests/fuzz/test_requests.py.
    """
    if text.startswith("a: &a"):  # nine of the line above, twelve times over: 9**12 values
        for number in range(12):
            one, other = chr(97 + number), chr(98 + number)
            nine = ", ".join([f"*{one}"] * 9)
            text += f"{other}: &{other} " + (f"[{nine}]\n" if "[1" in text else f"{{<<: [{nine}]}}\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=reason) as caught:
        parsed(str(path))
    assert len(str(caught.value)) < 600
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    with pytest.raises(RequestError):
        parse_request(["quick"], (Options,), command="train", load_recipe=lambda _: load_recipe(str(path)))


def test_merged_and_shared_values_still_work_in_a_recipe(tmp_path):
    """Goes red if every alias is refused."""
    path = tmp_path / "recipe.yaml"
    path.write_text("title: &name a\nfolder: *name\ncolumns: {<<: {a: b}, c: d}\n")
    assert parsed(str(path)) == {"title": "a", "folder": "a", "columns": {"a": "b", "c": "d"}}
    path.write_text("columns: {<<: !!python/object/apply:os.abort {a: b}}\n")  # only the pairs are merged
    assert parsed(str(path)) == {"columns": {"a": "b"}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"title: \xff\n", r":1 cannot be read \(byte 0xff"),
        (b"\xff\xfet\0", "cannot be read"),
        (None, "Is a directory"),
    ],
)
def test_a_recipe_that_is_no_text_is_one_clear_error(content, reason, tmp_path):
    """Goes red if UnicodeDecodeError or IsADirectoryError comes through."""
    path = tmp_path / "recipe.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(RequestError, match=reason):
        parsed(str(path))


def test_an_endless_recipe_is_not_read_to_its_end():
    """Goes red if a device or a pipe is read until the memory is full."""
    with pytest.raises(RequestError, match="/dev/zero cannot be read .more than 64 KiB"):
        parsed("/dev/zero")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--scheduler", "a=!!python/object/apply:os.system [id]"], "--scheduler: .* does not fit; .*the tag"),
        (["--scheduler", "a=2024-99-99"], "no timestamp"),
        (["--columns", "a=b,a=c"], "one of its keys is given twice"),
        (["--columns", '{"a": "b", "a": "c"}'], "one of its keys is given twice"),
        (["--columns", "{" * 10_000], "does not fit"),
        (["--names", "[" * 10_000], "nested too deeply|does not fit"),
        (["--learning_rate", "9" * 5000 + "x"], "does not fit"),
        (["--limit", "9" * 5000], "does not fit"),
        (["x" * 5000], r"recipe file x.* cannot be read \(File name too long\)"),
        (["~nobody-of-this-name/r.yaml"], "cannot be read"),
        (["a\0.yaml"], r"a\\x00.yaml cannot be read"),
        (["--folder", "\udcff"], r"the argument '\\udcff' is not UTF-8 text"),
        (["--fol\x1b[2Jder", "a"], r"unknown option --fol\\x1b\[2Jder"),
        (["a\nb"], "unexpected|no such file|no recipe"),
        (["--no_shuffle", "x" * 5000], "takes no value"),
        (["-recipe.yaml"], r"unexpected argument '-recipe.yaml'.*\./-recipe.yaml"),
    ],
)
def test_a_hostile_argument_is_one_clear_error(argv, reason):
    """Goes red if an exception comes through, or what was typed reaches the terminal as it is. Found by fuzzing."""
    with pytest.raises(RequestError, match=reason) as caught:
        parse_request(argv, (Options, More), command="train", load_recipe=load_recipe)
    assert all(line.isprintable() for line in str(caught.value).splitlines()) and len(str(caught.value)) < 600
