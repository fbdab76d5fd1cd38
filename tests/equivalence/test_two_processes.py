"""Two processes train what one process trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from datasets import Dataset
from psft import PSFTConfig, PSFTTrainer
from psft.models import load_model, load_tokenizer

model, rows, output_dir, objective = sys.argv[1:]
args = PSFTConfig(
    output_dir=output_dir, objective=objective, train_batch_size=16, mini_batch_size=4, max_steps=8, learning_rate=1e-3,
    lr_scheduler_type="constant", bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, seed=3,
    max_tokens_per_micro_batch=48, gradient_checkpointing=False, eval_strategy="no",
)
data = Dataset.from_list(json.load(open(rows)))
trainer = PSFTTrainer(load_model(model), args, None, data, eval_dataset=data, processing_class=load_tokenizer(model))
trainer.train()
trainer.evaluate()
"""


def run(folder: Path, name: str, num_processes: int, *arguments: str) -> list[dict]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", f"--master_port={port}"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), str(script), arguments[0], arguments[1]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(folder / name), arguments[2]], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [*(folder / name / "metrics.jsonl").open(), *(folder / name / "eval.jsonl").open()]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("objective", ["psft", "sft"])
def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path, tiny_model_path, demonstrations, objective):
    """Goes red if a rank divides by its own tokens, if ranks draw the same rows, or if metrics are one rank's only."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in demonstrations]))
    arguments = (str(tiny_model_path), str(rows), objective)
    one, two = run(tmp_path, "one", 1, *arguments), run(tmp_path, "two", 2, *arguments)
    assert len(one) == len(two) == 8 + 2
    for single, double in zip(one, two, strict=True):
        for field in ("loss", "nll", "entropy", "grad_norm", "clip_fraction", "log_ratio_abs_max", "tokens", "value"):
            if single.get(field) is not None:
                # a difference of two rounded log-probs: its rounding is absolute, a few 1e-6 nats after 8 steps
                allowed = 1e-5 if field == "log_ratio_abs_max" else 1e-6
                assert double[field] == pytest.approx(single[field], rel=2e-5, abs=allowed), (field, single, double)
