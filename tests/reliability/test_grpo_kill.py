"""SIGKILL while a GRPO run samples, or while it updates: `resume` comes to the numbers of an untouched run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
from pathlib import Path
import datasets
from psft import GRPOStageConfig, GRPOStageTrainer
from psft.models import load_model, load_tokenizer

model, folder, where = sys.argv[1:]
rows = [{"prompt": [{"role": "user", "content": f"How many clips? {n}"}]} for n in range(12)]
calls = {"rollout": 0, "update": 0}

def dies(place, number):
    calls[place] += 1
    if place == where and calls[place] == number:
        os.kill(os.getpid(), signal.SIGKILL)

def letters(completions, **_):
    dies("rollout", 9)  # a call for each group: in the second or third round
    return [float("e" in completion[0]["content"]) for completion in completions]

class Trainer(GRPOStageTrainer):
    def _compute_loss(self, model, inputs):
        dies("update", 6)  # 2 passes a step, 2 steps a batch: between two passes of the third step
        return super()._compute_loss(model, inputs)

args = GRPOStageConfig(
    output_dir=folder, train_batch_size=4, mini_batch_size=2, num_generations=4, per_device_train_batch_size=4,
    max_completion_length=6, overlong_buffer=0, max_steps=6, learning_rate=1e-3, bf16=False, report_to="none",
    save_strategy="steps", save_steps=1, disable_tqdm=True, gradient_checkpointing=False, seed=3, probe_every=0,
    resume=True,
)
trainer = Trainer(
    load_model(model), args, datasets.Dataset.from_list(rows), reward_funcs=letters,
    processing_class=load_tokenizer(model),
)
trainer.train()
"""


def run(folder: Path, model: Path, where: str) -> int:
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(folder), where], env=environment, capture_output=True, timeout=280
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()[-3000:]
    return done.returncode


def numbers(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    timed = ("tokens_per_second", "peak_memory_bytes")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rollout", "update"])
def test_a_killed_run_goes_on_and_counts_nothing_twice(tmp_path, tiny_model_path, where):
    """Goes red if a row comes twice, a prompt is lost, or the numbers part after the checkpoint."""
    assert run(tmp_path / "whole", tiny_model_path, "nowhere") == 0
    assert run(tmp_path / "cut", tiny_model_path, where) == -signal.SIGKILL
    assert 0 < len(numbers(tmp_path / "cut")) < 6
    assert run(tmp_path / "cut", tiny_model_path, "nowhere") == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    answers = [(tmp_path / name / "answers.jsonl").read_text() for name in ("cut", "whole")]
    assert answers[0] == answers[1]
