"""Train several runs one after the other; started by test_many_processes.py, alone or as one of several ranks.

    python train_runs.py MODEL ROWS.json FOLDER RUNS.json

RUNS: {name: settings of PSFTConfig}. Four more settings: "float64" trains such weights; "lora" an adapter; "measured"
measures the cap of micro-batches, on a device that is never full; "cut_of" = [name, step] goes on with that run from
its checkpoint of that step. FOLDER/NAME gets the run folder, the final model, for each rank how many micro-batches it
had of its own (counts-RANK.json), how many answers it drew and tables it wrote (watched-RANK.json), and what rank 0 was
given back (facts.json).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainers.fake_device import FakeDevice

from psft import PSFTConfig, PSFTTrainer
from psft.models import load_model, load_tokenizer
from psft.trainers import clipped_tokens, probe

DEFAULTS = {
    "train_batch_size": 16, "mini_batch_size": 4, "max_tokens_per_micro_batch": 32, "max_steps": 12, "seed": 3,
    "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "bf16": False, "gradient_checkpointing": False,
    "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "probe_every": 0,
}  # fmt: skip


def spoiled(logps, completion_mask, *, normalizer, at, _calls=[0]):  # noqa: B006  one run of a process uses it
    """SFT whose loss is no number on rank 1, in its call number `at`."""
    _calls[0] += 1
    factor = float("nan") if torch.distributed.get_rank() == 1 and _calls[0] == at else 1.0
    return -factor * torch.where(completion_mask, logps, 0.0).sum() / normalizer


class Counting(PSFTTrainer):
    """Keeps how many micro-batches this rank had before it was brought into step with the others."""

    counts: list[int]

    def _in_step(self, mini_batches):
        self.counts += [len(mini_batch) for mini_batch in mini_batches]
        return super()._in_step(mini_batches)


class Watched:
    """Counts the answers this rank draws and the tables of clipped tokens it writes."""

    def __init__(self) -> None:
        self.counts = {"answers": 0, "tables": 0}
        self._sample, self._write = probe.sample_answers, clipped_tokens.write_clipped_tokens
        probe.sample_answers, clipped_tokens.write_clipped_tokens = self.sample, self.write

    def sample(self, forward, prompts, *rest, **how):
        self.counts["answers"] += len(prompts)
        return self._sample(forward, prompts, *rest, **how)

    def write(self, path, rows):
        self.counts["tables"] += 1
        self._write(path, rows)

    def taken(self) -> dict[str, int]:
        counts, self.counts = self.counts, {"answers": 0, "tables": 0}
        return counts


def cut(folder: Path, name: str, source: str, step: int) -> None:
    shutil.copytree(folder / source, folder / name)
    for path in (folder / name).glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


def train(model_path: str, data: Dataset, folder: Path, name: str, settings: dict, watched: Watched) -> None:
    is_float64, of = settings.pop("float64", False), settings.pop("cut_of", None)
    is_measured, is_lora = settings.pop("measured", False), settings.pop("lora", False)
    args = PSFTConfig(output_dir=str(folder / name), resume=of is not None, **{**DEFAULTS, **settings})
    if of is not None:
        if args.process_index == 0:
            cut(folder, name, *of)
        if args.world_size > 1:
            torch.distributed.barrier()
    model = load_model(model_path)
    adapter = LoraConfig(target_modules="all-linear", r=4) if is_lora else None
    trainer = Counting(
        model.double() if is_float64 else model, args, None, data, data, load_tokenizer(model_path), peft_config=adapter
    )
    trainer.counts = []
    if is_measured:
        trainer.micro_batch_cap.meter = FakeDevice(10**9)
    result = trainer.train()
    trainer.save_model()
    (folder / name / f"counts-{args.process_index}.json").write_text(json.dumps(trainer.counts))
    (folder / name / f"watched-{args.process_index}.json").write_text(json.dumps(watched.taken()))
    if args.process_index == 0:
        facts = {"train_loss": result.training_loss, "model": type(trainer.model_wrapped).__name__}
        (folder / name / "facts.json").write_text(json.dumps(facts))
    trainer.accelerator.free_memory()


if __name__ == "__main__":
    torch.set_num_threads(1)
    model_path, rows, folder, runs = sys.argv[1:]
    data = Dataset.from_list(json.loads(Path(rows).read_text()))
    watched = Watched()
    for name, settings in json.loads(Path(runs).read_text()).items():
        train(model_path, data, Path(folder), name, settings, watched)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
