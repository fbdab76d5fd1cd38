"""The automatic cap inside a trainer: found, remembered, kept over a resumption, lowered when memory runs out.

Steps are real, on the tiny model; what memory they take is the fake device's law.
"""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forms import FORMS, needs_cache
from trainers.fake_device import FakeDevice

from psft.errors import RunFailed
from psft.trainers.cap_measuring import SAFE_SHARE
from psft.trainers.cap_rehearsal import Rehearsal
from psft.trainers.remembered_cap import RememberedCap, caps_folder, write_cap

LONGEST = 29  # tokens, of the fixture `demonstrations`
TIMINGS = {"tokens_per_second", "peak_memory_bytes"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("psft.trainers.cap_measuring._LEAST_PROBE_TOKENS", 1)  # rows of the tiny data are short
    monkeypatch.setattr("psft.trainers.cap_measuring._GRAIN", 1)
    return tmp_path / "cache" / "micro_batch_caps"


@pytest.fixture
def on_device(make_trainer):
    """on_device(device, name, **settings) -> trainer whose every forward and backward takes memory of the device."""

    def make(device, name="run", **settings):
        trainer = make_trainer(name, **{"max_tokens_per_micro_batch": "auto", **settings})
        device.gradients = optimizer_bytes(trainer) // 2
        device.total += device.gradients + optimizer_bytes(trainer)
        trainer.micro_batch_cap.meter = device
        step = trainer.training_step

        def training_step(model, inputs, num_items_in_batch=None):
            for micro_batch in inputs["micro_batches"]:
                device.run(*micro_batch["input_ids"].shape)
            return step(model, inputs, num_items_in_batch)

        trainer.training_step = training_step
        return trainer

    return make


def device(**law):
    """Room for 111 tokens of the longest rows: not for the four of a mini-batch."""
    return FakeDevice(**{"total": 180_000, "weights": 10_000, "gradients": 0, "a": 1000, "b": 10, "fixed": 500, **law})


def rows_of(trainer, name="metrics.jsonl"):
    rows = [json.loads(line) for line in (Path(trainer.args.output_dir) / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def info_of(trainer):
    return json.loads((Path(trainer.args.output_dir) / "run.json").read_text())


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_run(one, other):
    assert rows_of(one) == rows_of(other)
    first, second = weights_of(one), weights_of(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def optimizer_bytes(trainer):
    return 2 * 4 * sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def test_the_cap_is_measured_announced_recorded_and_kept_to(on_device, caplog, demonstrations):
    """Goes red if the optimizer's moments are not reckoned with, if the cap does not reach the sampler, or run.json."""
    caplog.set_level("INFO", logger="psft")
    assert max(len(row["input_ids"]) for row in demonstrations) == LONGEST
    trainer = on_device(device())
    trainer.train()
    room = SAFE_SHARE * 170_000 - 500
    cap = info_of(trainer)["micro_batch_cap"]
    assert cap["source"] == "measured" and cap["tokens"] <= room / (1000 + 10 * LONGEST) < cap["tokens"] + 2
    assert cap["measured"]["row_tokens"] == LONGEST and len(cap["measured"]["probes"]) >= 2
    assert f"max_tokens_per_micro_batch=auto: {cap['tokens']} padded tokens, measured now" in caplog.text
    assert trainer.get_train_dataloader().window_sampler.cut.max_tokens == cap["tokens"]


def test_a_run_with_a_measured_cap_is_the_run_with_that_number(on_device, make_trainer, make_tiny_model):
    """With dropout, so that the random state shows. Goes red if measuring takes an optimizer step, leaves gradients or
    moments behind, draws random numbers that stay drawn, or counts as a step."""
    settings = {"objective": "sft", "max_steps": 5}
    measured = on_device(device(), "measured", model=make_tiny_model(attention_dropout=0.3), **settings)
    measured.train()
    cap = info_of(measured)["micro_batch_cap"]
    given = make_trainer(
        "given", model=make_tiny_model(attention_dropout=0.3), max_tokens_per_micro_batch=cap["tokens"], **settings
    )
    given.train()
    assert_same_run(measured, given)
    assert info_of(given)["micro_batch_cap"] == {"tokens": cap["tokens"], "source": "given", "measured": None}


@pytest.mark.parametrize("form", FORMS)
def test_a_rehearsal_leaves_everything_as_it_was_to_the_bit(form, make_trainer, tmp_path):
    """Weights, buffers, gradients, optimizer, random state, place. Goes red if any is not put back, or if an objective
    needs something that is not there before the first window."""
    folder = {"ref_cache_dir": str(tmp_path / "refs")} if needs_cache(form) else {}
    trainer = make_trainer(objective=form.split("-")[0], **folder, **FORMS[form])
    trainer.create_optimizer()
    held = trainer.model.get_parameter("model.norm.weight")
    held.grad = torch.full_like(held, 0.5)  # one gradient that is there already
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    buffers = {name: value.clone() for name, value in trainer.model.named_buffers()}
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    seen = {}
    with Rehearsal(trainer) as rehearsal:
        rehearsal.run(3)
        seen = {name: p.grad.abs().max().item() for name, p in trainer.model.named_parameters() if p.grad is not None}
        random.random(), np.random.rand(), torch.rand(1)
        next(trainer.model.buffers()).add_(1)
    assert len(seen) == len(list(trainer.model.parameters())) and max(seen.values()) > 0, "it did train"
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in trainer.model.named_buffers())
    assert {name for name, p in trainer.model.named_parameters() if p.grad is not None} == {"model.norm.weight"}
    assert not trainer.optimizer.state
    assert random.getstate() == drawn[0] and np.random.get_state()[1].tolist() == drawn[1]
    assert torch.equal(torch.get_rng_state(), drawn[2])
    assert trainer._window is None and trainer._current_step is None and trainer.recorder.telemetry is None


def test_a_cap_is_remembered_for_the_same_conditions_alone(on_device, demonstrations):
    """Goes red if the objective, the longest row, or the device's memory is left out of the key."""
    first = on_device(device(), "first", max_steps=1)
    first.train()
    probes = len(first.micro_batch_cap.measured["probes"])
    assert probes >= 2
    again = on_device(device(), "again", max_steps=1)
    again.train()
    cap = info_of(again)["micro_batch_cap"]
    assert cap["source"] == "remembered" and cap["tokens"] == info_of(first)["micro_batch_cap"]["tokens"]
    assert len(again.micro_batch_cap.meter.rows_run) == len(first.micro_batch_cap.meter.rows_run) - probes - 1
    short = demonstrations.filter(lambda row: len(row["input_ids"]) < LONGEST)
    for name, settings in {
        "objective": {"objective": "gem"}, "checkpointing": {"gradient_checkpointing": True},
        "mini-batch": {"mini_batch_size": 8}, "data": {"train_dataset": short},
    }.items():  # fmt: skip
        other = on_device(device(), name, max_steps=1, **settings)
        other.train()
        assert info_of(other)["micro_batch_cap"]["source"] == "measured", name
    larger = on_device(device(total=200_000), "larger", max_steps=1)
    larger.train()
    assert info_of(larger)["micro_batch_cap"]["source"] == "measured"


def test_a_remembered_cap_that_does_not_fit_now_is_measured_anew(on_device):
    """Another process has taken memory since. Goes red if the file is trusted without a look at the device."""
    first = on_device(device(), "first", max_steps=1)
    first.train()
    crowded = device()
    crowded.others = 40_000
    again = on_device(crowded, "again", max_steps=1)
    again.train()
    cap = info_of(again)["micro_batch_cap"]
    assert cap["source"] == "measured" and cap["tokens"] < info_of(first)["micro_batch_cap"]["tokens"]


@pytest.mark.parametrize("fault", ["cut off", "changed", "other key", "of other conditions", "no json"])
def test_a_damaged_entry_is_measured_anew_with_a_warning(on_device, cache, caplog, fault):
    """Goes red if a checksum or the name is not looked at."""
    first = on_device(device(), "first", max_steps=1)
    first.train()
    (path,) = cache.glob("*.json")
    content = path.read_text()
    if fault == "cut off":
        path.write_text(content[:-20])
    elif fault == "changed":
        path.write_text(content.replace('"tokens": ', '"tokens": 9', 1))
    elif fault == "other key":
        path.write_text(content.replace('"optim"', '"optin"'))
    elif fault == "of other conditions":
        write_cap(cache / "other", RememberedCap(9999, {"model": "another"}))
        next((cache / "other").iterdir()).replace(path)
    else:
        path.write_bytes(b"\x00\xff")
    again = on_device(device(), "again", max_steps=1)
    again.train()
    assert info_of(again)["micro_batch_cap"] == info_of(first)["micro_batch_cap"]
    assert f"the remembered cap in {path} is ignored" in caplog.text
    assert json.loads(path.read_text()) == json.loads(content)


SAVED = {"max_steps": 14, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}


def cut_back(whole, folder, step):
    shutil.copytree(whole.args.output_dir, folder)
    for path in folder.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


def test_a_resumed_run_keeps_the_cap_of_its_checkpoint(on_device, tmp_path, cache):
    """Although nothing is remembered any more and less memory is free now. Goes red if it is measured anew: the run
    would not end in the same bits."""
    whole = on_device(device(), "whole", **SAVED)
    whole.train()
    shutil.rmtree(cache)
    for step in (2, 8):
        cut_back(whole, tmp_path / f"cut{step}", step)
        crowded = device()
        crowded.others = 30_000
        again = on_device(crowded, f"cut{step}", resume=True, **SAVED)
        again.train()
        assert_same_run(again, whole)
        assert info_of(again)["micro_batch_cap"]["source"] == "checkpoint" and not cache.exists()


def ran_out(on_device, name, step, **settings):
    """A run whose memory runs out in `step`, under a law that allows the cap it measured."""
    trainer = on_device(device(), name, **SAVED, **settings)
    fake, training_step = trainer.micro_batch_cap.meter, trainer.training_step

    def failing(model, inputs, num_items_in_batch=None):
        if trainer.state.global_step == step - 1:
            fake.oom_at = 1
        return training_step(model, inputs, num_items_in_batch)

    trainer.training_step = failing
    with pytest.raises(RunFailed) as failure:
        trainer.train()
    return trainer, str(failure.value)


def test_memory_that_runs_out_lowers_the_cap_for_the_windows_to_come(on_device, caplog, monkeypatch):
    """In step 7, two steps into the second window; the checkpoint of step 6 holds micro-batches over the lowered cap.
    Goes red if the open window is cut anew (its old log-probs are of another layout), if the run ends in the same
    error for ever, or if the cap is not lowered."""
    monkeypatch.setattr("psft.trainers.micro_batch_cap._LOWERED_SHARE", 0.4)
    trainer, message = ran_out(on_device, "run", 7)
    cap = trainer.micro_batch_cap.tokens
    lower = int(0.4 * cap)
    assert lower > LONGEST
    assert f"up to {cap} padded tokens (max_tokens_per_micro_batch=auto: measured now" in message
    assert f"it is {lower} from now on" in message and "last complete checkpoint" in message and "--resume" in message
    summary = json.loads((Path(trainer.args.output_dir) / "summary.json").read_text())
    assert summary["exit_reason"].startswith("failed: OutOfMemoryError") and summary["steps"] == 6
    again = on_device(device(), "run", resume=True, **SAVED)
    largest = []
    again.data_collator = noting_sizes(again.data_collator, largest)
    again.train()
    assert info_of(again)["micro_batch_cap"] == {"tokens": lower, "source": "lowered", "measured": None}
    assert "the open window is dropped" in caplog.text and "next window boundary" in caplog.text
    rows = rows_of(again)
    assert [row["step"] for row in rows] == list(range(1, 15)) and rows[6]["mini_batch"] == 1
    assert max(largest) <= lower
    third = on_device(device(), "third", max_steps=1)  # and a new run knows it
    third.train()
    assert info_of(third)["micro_batch_cap"]["source"] == "lowered"


def noting_sizes(collate, sizes):
    def noted(rows):
        batch = collate(rows)
        sizes.append(batch["input_ids"].numel())
        return batch

    return noted


def test_an_open_window_that_fits_under_the_lowered_cap_is_kept(on_device, tmp_path):
    """Rows so short that every micro-batch of the window fits. Goes red if a window is dropped that could go on."""
    whole = on_device(device(), "whole", **SAVED)
    whole.train()
    largest = max(
        len(group) * max(whole.row_lengths[row] for row in group)
        for step, groups in enumerate(whole.get_train_dataloader().window_sampler)
        if step in (6, 7)
        for group in groups
    )
    cut_back(whole, tmp_path / "cut", 6)
    again = on_device(device(), "cut", resume=True, **SAVED)
    again.micro_batch_cap.begin()
    write_cap(caps_folder(), RememberedCap(largest, again.micro_batch_cap.depends_on, lowered_from=10**6))
    assert largest < whole.micro_batch_cap.tokens
    again.train()
    assert rows_of(again)[:8] == rows_of(whole)[:8]
    assert info_of(again)["micro_batch_cap"]["tokens"] == largest
    assert rows_of(again)[8]["mini_batch"] == 1 and rows_of(again)[8]["loss"] == pytest.approx(-1.0, abs=1e-6)


def test_memory_that_runs_out_under_a_cap_of_ones_own_says_what_to_set(on_device, cache):
    trainer, message = ran_out(on_device, "run", 3, max_tokens_per_micro_batch=100)
    assert "max_tokens_per_micro_batch=100 padded tokens; set it lower, e.g. 80" in message
    assert "--resume --allow_changed batch_sizes" in message and not cache.exists()
    again = on_device(
        device(), "run", resume=True, allow_changed=["batch_sizes"], **SAVED, max_tokens_per_micro_batch=80
    )
    again.train()
    assert len(rows_of(again)) == 14


def test_memory_that_runs_out_with_one_row_is_no_matter_of_the_cap(on_device, cache):
    _, message = ran_out(on_device, "run", 3, max_tokens_per_micro_batch=LONGEST)
    assert "the longest row, 29 tokens, does not fit" in message and "use_peft" in message and not cache.exists()


def test_held_out_data_that_do_not_fit_name_their_own_setting(make_trainer, demonstrations, cache):
    trainer = make_trainer(eval_dataset=demonstrations, eval_strategy="steps", eval_steps=1)
    score = trainer._score

    def out_of_memory(model, batch, **how):
        if not torch.is_grad_enabled() and "row_numbers" not in batch:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(model, batch, **how)

    trainer._score = out_of_memory
    with pytest.raises(RunFailed, match="held-out data were scored.*8 rows: set per_device_eval_batch_size lower"):
        trainer.train()
    assert not cache.exists()


def test_on_a_cpu_it_is_the_rule_or_what_its_memory_takes(make_trainer, monkeypatch, caplog):
    """Goes red if free memory is not looked at, or gradients and moments to come are left out."""
    import psutil

    roomy = make_trainer("roomy", max_tokens_per_micro_batch="auto", max_steps=1)
    roomy.train()
    assert info_of(roomy)["micro_batch_cap"] == {"tokens": 1024, "source": "rule", "measured": None}
    trainer = make_trainer("short", max_tokens_per_micro_batch="auto", max_steps=1)
    states = 3 * 4 * sum(p.numel() for p in trainer.model.parameters())
    # two layers of 4 x 4 x 32 + 4 x (2 x 32 + 4 x 32 + 4 x 16 + 4 x 64) bytes, and 2 x 4 x 32
    a_token = 2 * (16 * 32 + 4 * 512) + 8 * 32
    free = states + int(100.5 * a_token / SAFE_SHARE)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=free))
    trainer.train()
    assert info_of(trainer)["micro_batch_cap"]["tokens"] == 100
    assert "free memory is short" in caplog.text


def test_where_a_probe_would_take_a_step_it_is_a_guess(on_device, monkeypatch):
    """DeepSpeed steps inside a backward pass. Goes red if it is measured all the same."""
    trainer = on_device(device())
    trainer.micro_batch_cap.is_cpu = False
    trainer.micro_batch_cap.begin()
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    trainer.micro_batch_cap.settle()
    assert (trainer.micro_batch_cap.tokens, trainer.micro_batch_cap.source) == (8192, "rule")
    assert trainer.micro_batch_cap.meter.rows_run == []
