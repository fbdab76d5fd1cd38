"""`psft dpo` as a person meets it: pairs, run folder, plan, report; bad rows and requests; two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from psft.cli.launch import FOLDER
from psft.cli.main import main
from psft.machine import LOCAL_RANK

PAIRS = [
    {
        "prompt": f"How many clips in May, if {n} were sold in April?",
        "chosen": f"She sold {n} / 2 = {n // 2} clips. The answer is {n // 2}.",
        "rejected": "I do not know." if n % 4 else f"The answer is {n}, as in April and in every other month.",
    }
    for n in range(2, 26, 2)
]


@pytest.fixture
def pairs_path(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


@pytest.fixture
def arguments(tiny_model_path, pairs_path, tmp_path):
    """arguments(*flags) -> the command line after `psft`; later flags win."""

    def make(*flags: str) -> list[str]:
        return [
            "dpo", "--model_name_or_path", str(tiny_model_path), "--dataset", str(pairs_path), "--output_dir",
            str(tmp_path / "run"), "--max_steps", "4", "--train_batch_size", "4", "--learning_rate", "1e-2", "--beta",
            "0.3", "--lr_scheduler_type", "constant", "--bf16", "false", "--report_to", "none", "--save_strategy", "no",
            "--disable_tqdm", "true", "--gradient_checkpointing", "false", "--probe_every", "0", *flags,
        ]  # fmt: skip

    return make


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_learns_the_preference_and_leaves_everything_in_its_folder(arguments, pairs_path, tmp_path, capsys):
    """Goes red if margins do not grow, a file is missing, or the model saved is not the one trained."""
    assert main(arguments("--eval_dataset", f"held={pairs_path}", "--max_steps", "6")) == 0
    folder = tmp_path / "run"
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["rewards_margin"] > 1 and rows[-1]["rewards_accuracy"] == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["exit_reason"] == "finished"
    assert summary["first"]["held_rewards_accuracy"] == 0 and summary["last"]["held_rewards_accuracy"] > 0.9
    assert "rewards_margin" in capsys.readouterr().out
    info = json.loads((folder / "run.json").read_text())
    assert info["stage"] == "dpo" and info["data_reports"]["train"]["format"] == "prompt-chosen-rejected"
    assert (folder / "model.safetensors").exists() and "DPO" in (folder / "README.md").read_text()
    assert main(arguments("--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "again"))) == 0
    again = rows_of(tmp_path / "again")
    assert again[0]["logps_chosen"] > rows[0]["logps_chosen"]  # it starts where the first run ended


def test_a_report_shows_the_stage(arguments, tmp_path):
    """Figure 6 of the paper. Goes red if the report does not know the fields, or fails on a run without NLL."""
    assert main(arguments()) == 0
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Chosen minus rejected" in page and "None of these runs is a DPO stage" not in page


def test_bad_rows_stop_the_run_or_are_left_out(arguments, pairs_path, tmp_path, capsys):
    """Goes red if a bad pair is trained on, or is not recorded with its line."""
    with pairs_path.open("a") as lines:
        lines.write(json.dumps({**PAIRS[0], "rejected": PAIRS[0]["chosen"]}) + "\n")
    assert main(arguments()) == 2
    error = capsys.readouterr().err
    assert "pairs.jsonl:13: chosen and rejected are the same answer" in error and "--on_bad_row skip" in error
    (rejected,) = rows_of(tmp_path / "run", "rejected.jsonl")
    assert rejected["line"] == 13
    assert main(arguments("--on_bad_row", "skip", "--output_dir", str(tmp_path / "skipped"))) == 0
    assert len(rows_of(tmp_path / "skipped", "rejected.jsonl")) == 1
    assert json.loads((tmp_path / "skipped" / "run.json").read_text())["num_train_rows"] == 12


def test_a_finished_run_is_not_written_over(arguments, capsys):
    assert main(arguments("--max_steps", "1")) == 0
    assert main(arguments("--max_steps", "1")) == 2
    assert "overwrite_output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--betta", "0.1"], "Did you mean --beta?"),
        (["--beta", "0"], "beta=0.0 must be greater than 0"),
        (["--epsilon_high", "0.2"], "unknown option --epsilon_high"),
        (["--max_tokens_per_micro_batch", "8"], "hard cap"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, capsys, flags, message):
    assert main(arguments(*flags)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_recipe_belongs_to_its_command(capsys, tmp_path):
    """Goes red if a recipe of the one is read as a bad request of the other."""
    assert main(["train", "dpo-quickstart"]) == 2
    assert "Run: psft dpo dpo-quickstart" in capsys.readouterr().err
    assert main(["dpo", "quickstart"]) == 2
    assert "Run: psft train quickstart" in capsys.readouterr().err
    mine = tmp_path / "mine.yaml"
    mine.write_text("stage: dpo\nbeta: 0.1\n")
    assert main(["train", str(mine)]) == 2
    assert "is for psft dpo" in capsys.readouterr().err


def test_a_plan_says_what_a_run_would_do(tiny_model_path, pairs_path, capsys):
    """Goes red if steps or tokens are not those that training has, or the example hides an answer."""
    flags = ["--model_name_or_path", str(tiny_model_path), "--dataset", str(pairs_path)]
    assert main(["plan", "dpo-quickstart", *flags, "--train_batch_size", "5"]) == 0
    plan = capsys.readouterr().out
    assert "pairs used       12 of 12" in plan and "steps in all     6  (epochs: 2)" in plan
    assert "chosen   ⟦She sold" in plan and "one forward pass over all pairs before the first step" in plan
    assert main(["plan", *flags, "--stage", "dpo", "--use_peft"]) == 0
    plan = capsys.readouterr().out
    assert "train_batch_size            64  (default)" in plan and "without its adapter" in plan
    assert main(["plan", "align-qwen3-4b-dpo", "--num_processes", "3"]) == 2
    assert "multiple of 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--precompute_ref_log_probs", "false"]])
def test_two_processes_give_the_numbers_of_one(arguments, tmp_path, flags):
    """12 pairs in steps of 4 and, at an epoch's end, 2: 10 are used. Goes red if a rank's pairs count twice, ranks
    average what should be summed, or the reference of one rank's pairs is missing on the other."""
    common = ["--max_rows", "10", "--max_steps", "6", "--max_tokens_per_micro_batch", "256", "--use_cpu", *flags]
    outside = {name: value for name, value in os.environ.items() if name not in (*LOCAL_RANK, FOLDER, "RANK")}
    for number in ("1", "2"):
        command = arguments(*common, "--num_processes", number, "--output_dir", str(tmp_path / number))
        done = subprocess.run(
            [sys.executable, "-m", "psft.cli.main", *command], env={**outside, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (rows_of(tmp_path / number) for number in ("1", "2"))
    assert [row["pairs"] for row in two] == [4, 4, 2, 4, 4, 2]
    for row in (one[0], two[0]):  # policy and reference are one: who of a pair is ahead is rounding
        del row["rewards_accuracy"]
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"tokens_per_second", "peak_memory_bytes"}:
            is_number = isinstance(a[name], float)
            assert a[name] == (pytest.approx(b[name], rel=2e-4, abs=2e-5) if is_number else b[name]), name
