"""A run that was stopped anywhere goes on to the same bits, or says why it cannot."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from psft.errors import RequestError
from psft.trainers.resume import STATE_FILE, read_resume_point

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
    "auto": {"max_tokens_per_micro_batch": "auto"},
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


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_resumed_anywhere_has_the_same_held_out_values(strategy, start, demonstrations, tmp_path):
    """Cut where an evaluation came before the checkpoint (3) or after it (epoch: 8), where none was (2), at the end.

    Goes red if a value measured after a checkpoint stays and is measured again, or is lost: an epoch's end comes after
    the checkpoint of its last step.
    """
    held = {name: demonstrations.select(range(4 * part, 4 * part + 4)) for part, name in enumerate(("one", "two"))}
    settings = {"eval_dataset": held, "eval_strategy": strategy, "eval_steps": 3, "eval_on_start": True}
    whole = start("whole", **settings)
    whole.train()
    values = rows_of(whole, "eval.jsonl")
    assert {row["step"] for row in values} == ({0, 3, 6, 9, 12, 14} if strategy == "steps" else {0, 8, 14})
    cuts = (
        [(0, True), (3, True), (14, True)] if strategy == "steps" else [(2, True), (8, True), (8, False), (14, False)]
    )
    for step, is_measured in cuts:  # killed after its held-out values were written, or before
        folder = tmp_path / f"cut{step}-{is_measured}"
        shutil.copytree(whole.args.output_dir, folder)
        for path in folder.glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        lines = (folder / "eval.jsonl").read_text().splitlines(keepends=True)
        num_rows = len(values) if is_measured else sum(row["step"] < step for row in values)
        (folder / "eval.jsonl").write_text("".join(lines[:num_rows]))
        again = start(folder.name, resume=True, **settings)
        again.train()
        assert rows_of(again, "eval.jsonl") == values, (step, is_measured)
        assert again.args.eval_on_start


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_signal_leaves_evaluation_out_and_the_resumed_run_makes_up_for_it(strategy, start, demonstrations):
    """Goes red if a stop waits for held-out data, if a value due at its step is lost, or one that was not is kept."""
    settings = {"eval_dataset": demonstrations.select(range(4)), "eval_strategy": strategy, "eval_steps": 3}
    whole = start("whole", **settings)
    whole.train()
    for step in (3, 8) if strategy == "steps" else (4, 8):
        stopped = start(f"stopped{step}", callbacks=[Signalled(step)], **settings)
        stopped.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, Signalled))
        stopped.train()
        assert stopped.state.global_step == step and stopped.stop_signal.exit_code == 143
        values = Path(stopped.args.output_dir) / "eval.jsonl"
        assert not values.exists() or all(row["step"] < step for row in rows_of(stopped, "eval.jsonl"))
        again = start(f"stopped{step}", resume=True, **settings)
        again.train()
        for name in ("metrics.jsonl", "eval.jsonl"):
            assert rows_of(again, name) == rows_of(whole, name), (step, name)


class Signalled(TrainerCallback):
    """SIGTERM in the middle of step `step`."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


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


def test_without_a_checkpoint_a_resumed_run_begins_at_the_start_and_says_so(start, demonstrations, caplog):
    """Goes red if anything that was recorded before stays, the first evaluation included."""
    whole = start("whole", save_strategy="no")
    whole.train()
    begun = start("begun", save_strategy="no", max_steps=3)
    begun.train()
    again = start("begun", save_strategy="no", resume=True)
    again.train()
    assert "starts at the beginning" in caplog.text
    assert rows_of(again) == rows_of(whole)
    begun = {"save_strategy": "no", "eval_dataset": demonstrations.select(range(4)), "eval_on_start": True}
    start("begun", overwrite_output_dir=True, max_steps=1, **begun).train()
    again = start("begun", resume=True, **begun)
    again.train()
    assert [row["step"] for row in rows_of(again, "eval.jsonl")] == [0, 0], "NLL and entropy, once"
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


def test_what_the_open_window_loses_is_trained_in_the_next_epoch(start):
    """Six steps of eight, then two more. Goes red if the run ends early, as the rest of its last epoch was left out.

    Seen: it stopped at 6 without a word.
    """
    start("run", max_steps=6, lr_scheduler_type="constant").train()
    allowed = {"allow_changed": ["seed"], "seed": 4}
    again = start("run", resume=True, max_steps=8, lr_scheduler_type="constant", **allowed)
    again.train()
    assert [(row["step"], row["mini_batch"]) for row in rows_of(again)][6:] == [(7, 1), (8, 2)]


def test_another_number_of_processes_is_refused_by_name(start):
    """Ranks hold parts of the window each. Goes red if the number of processes is not compared."""
    trainer = start("run", max_steps=2)
    trainer.train()
    path = Path(trainer.args.output_dir) / "checkpoint-2"
    state = json.loads((path / STATE_FILE).read_text())
    state["identity"]["world_size"] = 2
    (path / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(RequestError, match="not the run.*world_size: it was 2 and is 1.*--allow_changed world_size"):
        read_resume_point(trainer, path)
    trainer.args.allow_changed = ["world_size"]
    assert not read_resume_point(trainer, path).keeps_window


def test_a_changed_learning_rate_is_announced(start, caplog):
    start("run", max_steps=4).train()
    start("run", resume=True, learning_rate=2e-3).train()
    assert "learning_rate was 0.01 and is 0.002 now" in caplog.text


def test_other_threads_or_precision_are_announced(start, caplog):
    """Goes red if what the last bits follow from, beside the settings, is not watched."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    start("run", max_steps=2, num_threads=1, matmul_precision="highest").train()
    try:
        start("run", max_steps=4, resume=True, num_threads=2, matmul_precision="high").train()
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
    assert "num_threads was 1 and is 2 now" in caplog.text
    assert "matmul_precision was highest and is high now" in caplog.text


def test_the_records_tell_that_a_run_was_resumed(start):
    start("run", max_steps=4).train()
    again = start("run", resume=True)
    again.train()
    info = json.loads((Path(again.args.output_dir) / "run.json").read_text())
    assert [entry["step"] for entry in info["resumed"]] == [4]
    summary = json.loads((Path(again.args.output_dir) / "summary.json").read_text())
    assert summary["first"]["nll"] == rows_of(again)[0]["nll"] and summary["steps"] == 14


def test_the_newest_checkpoint_stays_beside_the_best_when_the_run_ends(start, demonstrations):
    """Goes red if transformers has its way, which deletes the newest: the run could then go on from the best alone."""
    settings = {"metric_for_best_model": "eval_entropy", "greater_is_better": False, "eval_strategy": "steps"}
    settings |= {"eval_steps": 1, "eval_dataset": demonstrations.select(range(4)), "load_best_model_at_end": True}
    trainer = start("run", save_total_limit=1, **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-14", "the test needs a best that is not the newest"
    assert {path.name for path in best.parent.glob("checkpoint-*")} == {best.name, "checkpoint-14"}


def test_only_save_total_limit_checkpoints_are_kept_and_all_are_complete(start):
    trainer = start("run", save_total_limit=2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-13", "checkpoint-14"]
    assert all((path / "psft_manifest.json").exists() for path in folder.glob("checkpoint-*"))
