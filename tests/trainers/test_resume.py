"""A run that was stopped anywhere goes on to the same bits, or says why it cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from psft.errors import RequestError

TIMINGS = {"tokens_per_second", "peak_memory_bytes"}


def rows_of(trainer_or_path, name="metrics.jsonl"):
    path = Path(getattr(trainer_or_path, "args", None) and trainer_or_path.args.output_dir or trainer_or_path)
    rows = [json.loads(line) for line in (path / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


RUNS = {
    "psft": {},
    "psft-controlled": {"target_clip_fraction": 0.2},
    "psft-moved-window": {"target_drift": 0.3, "learning_rate": 1e-3},
    "warm-up": {"sft_warmup_steps": 3, "sft_warmup_mini_batch_size": 8, "sft_warmup_optimizer_state": "reset"},
    "sft_kl": {"objective": "sft_kl"},
    "sft_kl-k3": {"objective": "sft_kl", "kl_estimator": "k3"},
    "iw_sft": {"objective": "iw_sft"},
    "sft": {"objective": "sft"},
    "padding-free": {"padding_free": True, "max_length": None},
}


@pytest.fixture
def start(make_trainer, tmp_path):
    """start(name, **settings) -> trainer of a run of 14 steps over two epochs, a checkpoint after every step."""

    def make(name, **settings):
        kwargs = {"max_steps": 14, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine", **settings}
        if settings.get("objective") == "iw_sft" or settings.get("kl_estimator"):
            kwargs["ref_cache_dir"] = str(tmp_path / "cache" / name)
        return make_trainer(name, **kwargs)

    return make


@pytest.mark.parametrize("run", RUNS)
def test_a_run_resumed_anywhere_ends_in_the_same_bits(run, start, tmp_path):
    """Cut after step 2 (inside the first window, or the warm-up), 6, 8 (an epoch's end), 11.

    Goes red if old log-probs are scored again, the cursor is lost, the schedule or the moments start anew, rows are
    drawn in another order, or metrics of repeated steps stay.
    """
    whole = start("whole", **RUNS[run])
    whole.train()
    for step in (2, 6, 8, 11):
        folder = tmp_path / f"cut{step}"
        shutil.copytree(whole.args.output_dir, folder)
        for path in folder.glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        again = start(f"cut{step}", resume=True, **RUNS[run])
        again.train()
        assert rows_of(again) == rows_of(whole)
        assert same_bits(weights_of(again), weights_of(whole))


def test_a_lora_run_resumes_to_the_same_bits(start, tmp_path, make_tiny_model):
    from peft import LoraConfig

    def lora():
        torch.manual_seed(5)
        return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "objective": "sft_kl"}

    whole = start("whole", **lora())
    whole.train()
    folder = tmp_path / "cut"
    shutil.copytree(whole.args.output_dir, folder)
    for path in folder.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 6:
            shutil.rmtree(path)
    again = start("cut", resume=True, **lora())
    again.train()
    assert rows_of(again) == rows_of(whole) and same_bits(weights_of(again), weights_of(whole))


def test_resuming_a_finished_run_trains_nothing(start):
    whole = start("run")
    whole.train()
    before = rows_of(whole)
    again = start("run", resume=True)
    again.train()
    assert rows_of(again) == before and same_bits(weights_of(again), weights_of(whole))


def test_without_a_checkpoint_a_resumed_run_begins_at_the_start_and_says_so(start, caplog):
    whole = start("whole", save_strategy="no")
    whole.train()
    begun = start("begun", save_strategy="no", max_steps=3)
    begun.train()
    again = start("begun", save_strategy="no", resume=True)
    again.train()
    assert "starts at the beginning" in caplog.text
    assert rows_of(again) == rows_of(whole)
    new = start("new", save_strategy="no", resume=True)
    new.train()
    assert rows_of(new) == rows_of(whole)


@pytest.mark.parametrize("fault", ["cut off", "changed", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(start, tmp_path, caplog, fault):
    """Goes red if sizes alone are compared, or the newest folder is taken for complete."""
    whole = start("run")
    whole.train()
    newest = Path(whole.args.output_dir) / "checkpoint-14"
    weights = newest / "model.safetensors"
    if fault == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif fault == "changed":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif fault == "missing":
        weights.unlink()
    else:
        (newest / "psft_manifest.json").unlink()
    again = start("run", resume=True)
    again.train()
    assert "checkpoint-14 is passed over" in caplog.text
    assert rows_of(again) == rows_of(whole)
    with pytest.raises(RequestError, match="cannot be resumed from"):
        weights.unlink(missing_ok=True)
        start("run").train(resume_from_checkpoint=str(newest))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"train_dataset": "fewer"}, "data"),
        ({"objective": "sft"}, "objective"),
        ({"epsilon_high": 0.2}, "objective: epsilon_high was 0.28 and is 0.2"),
        ({"mini_batch_size": 8}, "batch_sizes: mini_batch_size was 4 and is 8"),
        ({"seed": 4}, "seed: seed was 3 and is 4"),
    ],
)
def test_another_run_is_refused_by_name_and_allowed_on_request(start, demonstrations, changes, name, caplog):
    """Goes red if a changed run goes on in silence, or if --allow_changed drops more than the open window."""
    start("run", max_steps=6, lr_scheduler_type="constant").train()
    if "train_dataset" in changes:
        changes = {"train_dataset": demonstrations.select(range(24))}
    with pytest.raises(RequestError, match=f"(?s)not the run.*{name}.*--allow_changed"):
        start("run", resume=True, lr_scheduler_type="constant", **changes).train()
    allowed = name.partition(":")[0]
    trainer = start("run", resume=True, allow_changed=[allowed], lr_scheduler_type="constant", **changes)
    trainer.train()
    assert "next window boundary" in caplog.text
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == list(range(1, 15))
    assert rows[6]["mini_batch"] == 1


def test_a_changed_learning_rate_is_announced(start, caplog):
    start("run", max_steps=4).train()
    start("run", resume=True, learning_rate=2e-3).train()
    assert "learning_rate was 0.01 and is 0.002 now" in caplog.text


def test_the_records_tell_that_a_run_was_resumed(start):
    start("run", max_steps=4).train()
    again = start("run", resume=True)
    again.train()
    info = json.loads((Path(again.args.output_dir) / "run.json").read_text())
    assert [entry["step"] for entry in info["resumed"]] == [4]
    summary = json.loads((Path(again.args.output_dir) / "summary.json").read_text())
    assert summary["first"]["nll"] == rows_of(again)[0]["nll"] and summary["steps"] == 14


def test_only_save_total_limit_checkpoints_are_kept_and_all_are_complete(start):
    trainer = start("run", save_total_limit=2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-13", "checkpoint-14"]
    assert all((path / "psft_manifest.json").exists() for path in folder.glob("checkpoint-*"))
