"""`psft grpo` as a person meets it: prompts and rewards in, run folder and model out; and every kind of bad request."""

from __future__ import annotations

import json

import pytest

from psft import recipes
from psft.cli.grpo import read_request
from psft.cli.main import main

REWARDS = """
def letters(completions, **columns):
    return [float("e" in completion[0]["content"]) for completion in completions]

def alike(completions, **columns):
    return [1.0] * len(completions)
"""
PAPER = ["math-llama3.1-8b-grpo", "math-qwen2.5-7b-grpo"]


@pytest.fixture
def grpo(tiny_model_path, tmp_path, monkeypatch):
    """grpo(*flags) -> exit code of `psft grpo` on the tiny model; later flags win."""
    (tmp_path / "psft_cli_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"How many clips? {n % 9}"}) + "\n" for n in range(12))
    )

    def call(*flags: str) -> int:
        return main(
            ["grpo", "--model_name_or_path", str(tiny_model_path), "--dataset", str(tmp_path / "prompts.jsonl")]
            + ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--train_batch_size", "4"]
            + ["--mini_batch_size", "4", "--num_generations", "4", "--max_completion_length", "6"]
            + ["--overlong_buffer", "0", "--bf16", "false", "--report_to", "none", "--probe_every", "0"]
            + ["--save_steps", "1", "--disable_tqdm", "true", "--reward_workers", "1", "--learning_rate", "1e-3"]
            + ([] if "--rewards" in flags else ["--rewards", "psft_cli_rewards:letters=1"])  # two would be added
            + list(flags)
        )

    return call


def test_a_run_leaves_everything_in_its_folder_and_goes_on(grpo, tmp_path, capsys):
    """Goes red if a file is missing, a copy of a prompt is used, or a resumed run begins anew."""
    assert grpo() == 0
    printed = capsys.readouterr().out
    assert "9 prompts of" in printed and "3 copies left out" in printed and "reward_mean" in printed
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"metrics.jsonl", "answers.jsonl", "run.json", "summary.json", "model.safetensors"} <= names
    info = json.loads((folder / "run.json").read_text())
    assert info["stage"] == "grpo" and info["data_reports"]["train"]["num_duplicates"] == 3
    assert info["objective"]["settings"]["rewards"] == {"psft_cli_rewards:letters": 1.0}
    assert info["config"]["train_batch_size"] == 4 and info["config"]["epsilon_high"] == 0.28
    before = (folder / "metrics.jsonl").read_text()
    assert grpo("--max_steps", "3", "--resume") == 0
    after = (folder / "metrics.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 3
    assert grpo() == 2 and "holds another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--rewards", "maths=1"], 2, "unknown reward 'maths'. Did you mean math?"),
        (["--rewards", "choice=1"], 2, "prompts.jsonl:1: reward choice: field 'gold' is missing"),
        (["--rewards", "psft_cli_rewards:absent=1"], 2, "cannot be imported"),
        (["--rewards", "psft_cli_rewards:alike=1", "--max_sampling_rounds", "2"], 1, "rewarded alike (mean reward 1)"),
        (["--train_batch_size", "16", "--mini_batch_size", "16"], 2, "9 prompts, and 16 are sampled at once"),
        (["--steps_per_generation", "2"], 2, "follow from train_batch_size"),
        (["--max_prompt_length", "3"], 2, "every prompt is longer"),
        (["--eval_dataset", "a.jsonl"], 2, "not measured by psft grpo"),
        (["--dataset_format", "text"], 2, "dataset_format has no effect"),
    ],
)
def test_what_cannot_be_done_is_said_in_words(grpo, capsys, flags, code, message):
    """Goes red if a request ends in a traceback, in the wrong exit code, or without its reason."""
    assert grpo(*flags) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_run_needs_rewards(capsys):
    assert main(["grpo", "--model_name_or_path", "m", "--dataset", "d.jsonl"]) == 2
    assert "--rewards is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", PAPER)
def test_the_recipes_are_table_7(name):
    """Goes red if a value leaves the table, or what TRL is given is another arithmetic."""
    request = read_request([name])
    args = request.config
    assert (args.train_batch_size, args.mini_batch_size, args.num_generations) == (256, 32, 8)
    assert (args.generation_batch_size, args.gradient_accumulation_steps, args.max_steps) == (2048, 32, 800)
    assert (args.epsilon, args.epsilon_high, args.beta, args.loss_type) == (0.2, 0.28, 0.0, "dapo")
    assert (args.max_prompt_length, args.max_completion_length, args.overlong_buffer) == (2048, 10240, 2048)
    assert (args.learning_rate, args.temperature, args.weight_decay) == (1e-6, 1.0, 0.1)
    assert args.dynamic_sampling and not args.vllm_importance_sampling_correction
    assert request.model_name == f"runs/{name.removesuffix('-grpo')}-psft"
    assert args.reward_set().weights == {"math": 1.0, "overlong": 1.0}
    assert recipes.known_dataset(request.data.dataset, "train") is not None
    assert recipes.stage_of(name) == "grpo"


@pytest.mark.parametrize("name", [*PAPER, "grpo-quickstart"])
def test_every_recipe_plans_without_weights_or_network(name, capsys, monkeypatch, tmp_path):
    """Goes red if a recipe holds an unknown key or contradicts itself, or a plan needs the model."""
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path / "no-cache"))
    assert main(["plan", name]) == 0
    printed = capsys.readouterr().out
    shown = "32" if name == "grpo-quickstart" else "2048"
    assert f"x 8 answers = {shown}, one old policy" in printed and "weight 1" in printed
    assert not (tmp_path / "no-cache" / "models").exists()
