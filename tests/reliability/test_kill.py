"""Runs killed with SIGKILL at random moments, checkpoint writing included, end in the bits of an unbroken one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from psft.runs.clipped_tokens import read_clipped_tokens

KILL_RUNS = Path(__file__).with_name("kill_runs.py")
TIMINGS = {"tokens_per_second", "peak_memory_bytes"}
RUNS = {
    "psft": [],
    "warm-up": ["--sft_warmup_steps", "3", "--sft_warmup_mini_batch_size", "8"],
    "sft_kl": ["--objective", "sft_kl"],
    "lora": ["--use_peft", "--lora_r", "4"],
}


@pytest.fixture
def arguments(tiny_model_path, demonstrations, tiny_tokenizer, tmp_path):
    """Of `psft train`: 14 steps over more than one epoch of 32 rows, a checkpoint after every step, two workers."""
    data = tmp_path / "rows.jsonl"
    with data.open("w") as lines:
        for row in demonstrations:
            start = row["labels"].index(next(label for label in row["labels"] if label != -100))
            text = [tiny_tokenizer.decode(row["input_ids"][part]) for part in (slice(start), slice(start, None))]
            lines.write(json.dumps({"prompt": text[0], "completion": text[1]}) + "\n")
    return [
        "--model_name_or_path", str(tiny_model_path), "--dataset", str(data), "--max_steps", "14",
        "--train_batch_size", "16", "--mini_batch_size", "4", "--learning_rate", "1e-2", "--bf16", "false",
        "--report_to", "none", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2",
        "--dataloader_num_workers", "2", "--disable_tqdm", "true", "--max_tokens_per_micro_batch", "128",
        "--gradient_checkpointing", "false", "--eval_dataset", f"rows={data}", "--eval_split", "train",
        "--eval_strategy", "steps", "--eval_steps", "5", "--probe_every", "4", "--probe_max_new_tokens", "4",
    ]  # fmt: skip


def rows_of(folder, name):
    rows = [json.loads(line) for line in (folder / name).open()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def kill(folder, arguments, num_kills, seed):
    command = [sys.executable, str(KILL_RUNS), str(folder), str(num_kills), str(seed), "--", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    weights = "adapter_model.safetensors" if "--use_peft" in arguments else "model.safetensors"
    whole, killed = folder / "whole", folder / "killed"
    for name in ("metrics.jsonl", "eval.jsonl", "probe.jsonl"):
        assert rows_of(killed, name) == rows_of(whole, name), name
    tables = [read_clipped_tokens(path / "clipped_tokens.parquet") for path in (whole, killed)]
    assert tables[0] == tables[1] and bool(tables[0]) is ("sft_kl" not in arguments)
    one, other = load_file(whole / weights), load_file(killed / weights)
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    assert not list(killed.glob(".*")), "nothing half written is left"
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_four_times_ends_in_the_same_bits(tmp_path, arguments):
    """Goes red if a checkpoint is named before it is whole, or a row of a repeated step stays."""
    assert len(kill(tmp_path, arguments, num_kills=4, seed=1)) == 4


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_killed_twenty_times_ends_in_the_same_bits(tmp_path, arguments, run):
    """Goes red as above; and if the moments do not fall into different steps."""
    reached = kill(tmp_path, [*arguments, *RUNS[run]], num_kills=20, seed=2)
    assert len(reached) == 20 and len(set(reached)) > 3, reached


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_writes_a_checkpoint_and_exits_with_its_code(tmp_path, arguments, number):
    """Goes red if the step is cut off, the exit code is 0, or the resumed run differs."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "psft.cli.main", "train", *arguments, "--output_dir", str(folder)]
    slow = ["--max_steps", "400", "--save_steps", "1000", "--eval_strategy", "no", "--lr_scheduler_type", "constant"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *slow], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    metrics = folder / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors.decode()[-2000:]
    assert b"finishing this step" in errors
    steps = [row["step"] for row in rows_of(folder, "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 400
    assert (folder / f"checkpoint-{len(steps)}" / "psft_manifest.json").exists()
    assert json.loads((folder / "summary.json").read_text())["exit_reason"] == "interrupted"
    more = str(len(steps) + 2)
    done = subprocess.run([*command, *slow, "--max_steps", more, "--resume"], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert [row["step"] for row in rows_of(folder, "metrics.jsonl")] == list(range(1, len(steps) + 3))
