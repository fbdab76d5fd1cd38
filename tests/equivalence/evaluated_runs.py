"""Train a tiny model that is evaluated meanwhile; started by test_evaluated_runs.py, alone or as one of several ranks.

    python evaluated_runs.py MODEL ROWS.json SUITE.yaml FOLDER

FOLDER/with and FOLDER/lora are evaluated at steps 0, 2 and 4; FOLDER/without is the first of them without evaluation.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig

from psft import PSFTConfig, PSFTTrainer
from psft.models import load_model, load_tokenizer

model, rows, suite, folder = sys.argv[1:]
torch.set_num_threads(1)
data = Dataset.from_list(json.loads(Path(rows).read_text()))
evaluated = {"eval_suite": [suite], "eval_suite_batch_size": 2}
for name, settings in (
    ("with", {**evaluated, "select_best": "greedy"}), ("lora", evaluated), ("without", {})
):  # fmt: skip
    args = PSFTConfig(
        output_dir=f"{folder}/{name}", train_batch_size=8, mini_batch_size=4, max_steps=4, learning_rate=1e-3, seed=3,
        lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
        max_tokens_per_micro_batch=256, probe_every=0, save_strategy="steps", save_steps=2, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules="all-linear") if name == "lora" else None
    trainer = PSFTTrainer(load_model(model), args, None, data, None, load_tokenizer(model), peft_config=adapter)
    trainer.train()
    trainer.save_model()
    scores = None if trainer.benchmarks is None else trainer.benchmarks.best and trainer.benchmarks.best.state_dict()
    Path(f"{folder}/{name}/rank-{args.process_index}.json").write_text(json.dumps(scores))
    trainer.accelerator.free_memory()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
