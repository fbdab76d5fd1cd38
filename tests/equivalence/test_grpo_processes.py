"""GRPO by two processes keeps the groups that one process keeps, and trains on them to the same weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, zlib
import datasets, torch
from psft import GRPOStageConfig, GRPOStageTrainer
from psft.models import load_model, load_tokenizer

model, folder = sys.argv[1:]
rows = [{"prompt": [{"role": "user", "content": f"How many clips? {n}"}], "number": n} for n in range(24)]

def reward(completions, number, **_):  # two of three prompts have answers that differ
    return [1.0 if n % 3 == 0 else float(i % 2) for i, n in enumerate(number)]

args = GRPOStageConfig(
    output_dir=folder, train_batch_size=8, mini_batch_size=4, num_generations=4, per_device_train_batch_size=4,
    max_completion_length=6, overlong_buffer=0, max_steps=6, learning_rate=1e-3, bf16=False, report_to="none",
    save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, seed=3, probe_every=0, logging_steps=1,
)
data = datasets.Dataset.from_list(rows)
trainer = GRPOStageTrainer(load_model(model), args, data, reward_funcs=reward, processing_class=load_tokenizer(model))

def answers(prompt_ids, *_):  # by prompt and place in the group alone
    made = []
    for i, ids in enumerate(prompt_ids):
        draw = zlib.crc32(json.dumps([ids, i % 4]).encode())
        made.append([3 + (draw >> (5 * t)) % 300 for t in range(2 + draw % 4)])
    return made, None

trainer._generate_single_turn = answers
kept, moves, inner = [], [], trainer._share
def share(plan):
    kept.append(plan.groups)
    moves.append(len(plan.moves))
    return inner(plan)
trainer._share = share
# one permutation for a batch whatever the number of ranks would need one generator: take the answers as they come
import trl.trainer.grpo_trainer as module
module.shuffle_sequence_dict = lambda batch: batch
trainer.train()
weights = torch.cat([p.detach().flatten().double() for p in trainer.model.parameters()])
if trainer.is_world_process_zero():
    with open(f"{folder}/kept.json", "w") as file:
        json.dump({"kept": kept, "moves": sum(moves)}, file)
    torch.save(weights, f"{folder}/weights.pt")
"""


def run(folder: Path, name: str, num_processes: int, model: Path) -> Path:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", f"--master_port={port}"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), str(script), str(model), str(folder / name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / name


@pytest.mark.slow
def test_two_processes_keep_the_groups_that_one_keeps(tmp_path, tiny_model_path):
    """Goes red if a group goes to the wrong rank, is lost or doubled on its way, or an advantage is another's.

    A batch is 2 updates; a step holds other answers with 2 ranks (each takes its own in order), so weights are compared
    after the whole run, loosely; groups, rewards and counts exactly.
    """
    import torch

    one, two = (run(tmp_path, str(number), number, tiny_model_path) for number in (1, 2))
    kept = {path: json.loads((path / "kept.json").read_text())["kept"] for path in (one, two)}
    assert json.loads((two / "kept.json").read_text())["moves"] > 0, "no group had to travel: nothing is shown"
    assert [sorted(batch[0]) for batch in kept[one]] == [sorted(batch[0] + batch[1]) for batch in kept[two]]
    assert all(len(batch[0]) == len(batch[1]) == 4 for batch in kept[two])
    rows = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (one, two)]
    names = "reward_mean kept_group_share sampling_rounds groups_sampled groups_carried_over completion_length_mean"
    for alone, together in zip(*rows, strict=True):
        for name in names.split():
            assert (name in alone) == (name in together) == (alone["mini_batch"] == 1), name
            assert name not in alone or alone[name] == pytest.approx(together[name], rel=1e-6), name
    for first, second in zip(rows[0][::2], rows[0][1::2], strict=True):
        other = rows[1][first["step"] - 1]["tokens"] + rows[1][second["step"] - 1]["tokens"]
        assert first["tokens"] + second["tokens"] == other
    weights = [torch.load(path / "weights.pt") for path in (one, two)]
    assert (weights[0] - weights[1]).norm() < 0.05 * weights[0].norm()
