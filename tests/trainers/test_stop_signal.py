"""One signal stops a run in good order, however often and wherever it is delivered; a second one at once."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainerControl

from psft.cli.train import PreparedRun
from psft.config import SAME_SIGNAL_S
from psft.trainers import stop_signal
from psft.trainers.stop_signal import StopSignal


@pytest.fixture
def clock(monkeypatch):
    """clock[0]: the time, in seconds. A process that ends raises SystemExit with its code."""
    now = [1000.0]

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(stop_signal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stop_signal.os, "_exit", leave)
    return now


def ended_step(listener, *, world_size=1, **args):
    control = TrainerControl(should_evaluate=True, should_save=False)
    args = SimpleNamespace(
        **{"world_size": world_size, "save_strategy": "steps", "load_best_model_at_end": False, "device": "cpu", **args}
    )
    return listener.on_step_end(args, None, control)


def test_the_same_signal_twice_is_one_and_a_later_one_is_a_second(clock):
    """Goes red if a signal that a job's launcher hands on once more ends the process, or if none ever does."""
    listener = StopSignal()
    listener._received(signal.SIGTERM, None)
    clock[0] += SAME_SIGNAL_S / 2
    listener._received(signal.SIGTERM, None)
    assert ended_step(listener).should_training_stop and listener.exit_code == 143
    clock[0] += SAME_SIGNAL_S
    with pytest.raises(SystemExit) as ended:
        listener._received(signal.SIGINT, None)
    assert ended.value.code == 130


def test_a_signal_that_another_rank_had_first_is_not_a_second_one(clock, monkeypatch):
    """Goes red if a rank that learnt of a signal at the end of a step is ended by its own copy a moment later."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.fill_(signal.SIGTERM))
    listener = StopSignal()
    assert ended_step(listener, world_size=2).should_save and listener.exit_code == 143
    clock[0] += SAME_SIGNAL_S / 2
    listener._received(signal.SIGTERM, None)


@pytest.mark.parametrize("chooses_best", [False, True])
def test_a_stop_waits_for_held_out_data_only_where_the_checkpoint_needs_it(clock, chooses_best):
    """Goes red if a stop evaluates for minutes, or if the best checkpoint is chosen without its value."""
    listener = StopSignal()
    listener._received(signal.SIGINT, None)
    assert ended_step(listener, load_best_model_at_end=chooses_best).should_evaluate is chooses_best
    args = SimpleNamespace(load_best_model_at_end=chooses_best)
    for epoch, is_over in ((1.5, False), (2.0, True)):
        control = TrainerControl(should_evaluate=True, should_save=True)
        listener.on_epoch_end(args, SimpleNamespace(epoch=epoch), control)
        assert control.should_evaluate is control.should_save is (is_over and chooses_best)


def test_a_signal_counts_once_all_ranks_know_of_it(clock, monkeypatch):
    """Goes red if a rank acts on a signal alone: it leaves out an evaluation in which the others wait for it."""
    listener = StopSignal()
    listener._received(signal.SIGTERM, None)
    assert listener.number is None and listener.exit_code == 0
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: None)
    listener.on_train_end(SimpleNamespace(world_size=2, device="cpu"), None, None)
    assert listener.number == signal.SIGTERM


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_a_signal_after_the_last_step_loses_no_model(make_trainer, demonstrations, save_strategy):
    """At the end of the last evaluation. Goes red if the trained model is dropped, or the exit code is 0."""

    class Signalled(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(max_steps=2, eval_dataset=demonstrations.select(range(4)), eval_strategy="epoch",
                           save_strategy=save_strategy, save_steps=1, callbacks=[Signalled()])  # fmt: skip
    PreparedRun(trainer, {}).train()
    assert trainer.stop_signal.exit_code == 143
    folder = Path(trainer.args.output_dir)
    assert (folder / "model.safetensors").exists()
    assert json.loads((folder / "summary.json").read_text())["exit_reason"] == "interrupted"


def test_what_is_announced_is_what_is_done(clock, capfd):
    """Goes red if a checkpoint is promised where none is kept."""
    for strategy, is_kept in (("no", False), ("steps", True)):
        listener = StopSignal()
        listener.on_train_begin(SimpleNamespace(save_strategy=strategy), None, None)
        listener._received(signal.SIGINT, None)
        assert ("writing a checkpoint" in capfd.readouterr().err) is is_kept
        assert ended_step(listener, save_strategy=strategy).should_save is is_kept
