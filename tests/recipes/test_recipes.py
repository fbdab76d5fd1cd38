"""The recipes hold the paper's settings, and every key of theirs is a setting."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from psft import recipes
from psft.cli.recipes import run
from psft.errors import RequestError

PAPER = [
    "align-qwen3-4b-psft", "align-qwen3-4b-psft-prolong", "align-qwen3-4b-sft", "math-llama3.1-8b-psft",
    "math-llama3.1-8b-psft-warmup", "math-llama3.1-8b-sft", "math-llama3.1-8b-sft-kl", "math-qwen2.5-7b-psft",
    "math-qwen2.5-7b-psft-noclip", "math-qwen2.5-7b-psft-warmup", "math-qwen2.5-7b-sft", "math-qwen2.5-7b-sft-kl",
    "math-qwen2.5-7b-sft-matched",
]  # fmt: skip
PIPELINES = [
    "pipeline-align-qwen3-4b", "pipeline-math-llama3.1-8b", "pipeline-math-qwen2.5-7b", "pipeline-quickstart-dpo",
    "pipeline-quickstart-grpo",
]  # fmt: skip
STAGES = ["align-qwen3-4b-dpo", "math-llama3.1-8b-grpo", "math-qwen2.5-7b-grpo"]


def test_every_setting_of_the_paper_has_a_recipe() -> None:
    """Goes red if a file is missing from the package, or the data set table is listed as a recipe."""
    assert recipes.names() == [
        "quickstart",
        *sorted([*PAPER, *STAGES, *PIPELINES, "dpo-quickstart", "grpo-quickstart"]),
    ]


@pytest.mark.parametrize("name", PAPER)
def test_the_values_are_those_of_tables_6_and_8(name: str) -> None:
    """Goes red if a batch size, learning rate, clip, cut-off or number of epochs leaves the tables."""
    recipe = recipes.load_recipe(name)
    kind = name.split("b-", 1)[1]
    has_sft_rates = kind in ("sft", "sft-kl")
    assert recipe["objective"] == {"sft": "sft", "sft-matched": "sft", "sft-kl": "sft_kl"}.get(kind, "psft")
    assert (recipe["train_batch_size"], recipe["mini_batch_size"]) == (256, 256 if has_sft_rates else 32)
    assert recipe["learning_rate"] == (2e-5 if has_sft_rates else 1e-6)
    clip = None if kind.startswith("sft") else math.inf if kind == "psft-noclip" else 0.28
    assert recipe.get("epsilon_high") == clip
    assert recipe.get("kl_coef") == (0.5 if kind == "sft-kl" else None)
    assert recipe["weight_decay"] == 0.1
    assert recipe["max_length"] == (10240 if name.startswith("math") else 6144)
    assert recipe["num_train_epochs"] == (10 if name.startswith("math") or name.endswith("prolong") else 5)
    assert recipe.get("sft_warmup_steps", 0) == (200 if name.endswith("warmup") else 0)
    assert recipes.known_dataset(recipe["dataset"], recipe.get("dataset_split", "train")) is not None


@pytest.mark.parametrize(
    ("name", "base", "changed"),
    [
        ("math-qwen2.5-7b-sft-kl", "math-qwen2.5-7b-sft", {"objective", "kl_coef", "kl_direction", "kl_estimator"}),
        ("math-llama3.1-8b-sft-kl", "math-llama3.1-8b-sft", {"objective", "kl_coef", "kl_direction", "kl_estimator"}),
        ("math-qwen2.5-7b-sft-matched", "math-qwen2.5-7b-psft", {"objective", "epsilon_high"}),
        ("math-qwen2.5-7b-psft-noclip", "math-qwen2.5-7b-psft", {"epsilon_high"}),
    ],
)
def test_a_control_differs_from_its_base_in_the_objective_alone(name: str, base: str, changed: set[str]) -> None:
    """Goes red if a control changes anything else: seed, data, batch sizes, schedule."""
    one, other = recipes.load_recipe(name), recipes.load_recipe(base)
    assert {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} == {*changed, "output_dir"}


def test_the_values_of_dpo_are_those_of_table_9() -> None:
    """Goes red if a value leaves the table, or the recipe is taken for one of psft train."""
    recipe = recipes.load_recipe("align-qwen3-4b-dpo")
    table = {"beta": 0.01, "learning_rate": 5e-7, "train_batch_size": 64, "num_train_epochs": 1, "max_length": 4096}
    assert {name: recipe[name] for name in table} == table
    assert recipes.stage_of("align-qwen3-4b-dpo") == recipes.stage_of("dpo-quickstart") == "dpo"
    assert recipes.stage_of("align-qwen3-4b-psft") == "train"
    assert recipes.maker_of(recipe["model_name_or_path"]) == ("train", "align-qwen3-4b-psft")
    assert recipes.known_dataset(recipe["dataset"], recipe["dataset_split"]) is not None


@pytest.mark.parametrize("name", [*PAPER, *STAGES])
def test_every_value_of_a_paper_recipe_names_its_source(name: str) -> None:
    """Goes red if a line loses its comment (output_dir needs none)."""
    lines = recipes.read_text(name).splitlines()[1:]
    unsourced = [line for line in lines if line and "  # " not in line and not line.startswith("output_dir")]
    assert unsourced == []


def test_a_misspelt_recipe_gets_the_nearest_name() -> None:
    """Goes red if the nearest name is not looked for."""
    with pytest.raises(RequestError, match="did you mean math-qwen2.5-7b-psft?"):
        recipes.load_recipe("math-qwen2.5-7b-pstf")


@pytest.mark.parametrize(
    ("text", "message"), [("a: 1\na: 2\n", "a is given twice"), ("- a\n", "holds a list"), ("a: [1\n", "no valid YAML")]
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    """Goes red if YAML's last-one-wins, or its own many-line errors, come through."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        recipes.load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_the_command_lists_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Goes red if a recipe loses its describing first line."""
    assert run([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(PAPER) + len(STAGES) + len(PIPELINES) and all(
        len(line.split(maxsplit=1)[1]) > 20 for line in lines
    )
    assert run(["quickstart"]) == 0
    assert capsys.readouterr().out == recipes.read_text("quickstart")
    with pytest.raises(RequestError, match="one name"):
        run(["a", "b"])
