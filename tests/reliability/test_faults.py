"""Faults of the machine: what happens, and that what was complete stays. The table is in docs/reliability.md."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from psft.cli.train import PreparedRun
from psft.errors import RequestError, RunFailed
from psft.runs import RunFolder
from psft.runs.checkpoints import newest_complete


def rows_of(trainer):
    rows = [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").open()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


class At(TrainerCallback):
    """Calls `do` when step `step` has ended, before its checkpoint is written."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do()


@pytest.fixture
def largest_file():
    """largest_file(bytes): from now on no file may grow beyond; what a full disk does to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8}


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_leaves_the_one_before(make_trainer, largest_file, caplog):
    """Goes red if the half-written checkpoint keeps its name, or the error is a library's."""
    whole = make_trainer("whole", **SAVING)
    whole.train()
    trainer = make_trainer("run", callbacks=[At(4, lambda: largest_file(40_000))], **SAVING)
    with pytest.raises(RunFailed, match=r"checkpoint 4 cannot be written.*Earlier checkpoints are whole.*--resume"):
        trainer.train()
    largest_file(resource.RLIM_INFINITY)
    folder = Path(trainer.args.output_dir)
    assert newest_complete(folder)[0].step == 3 and not list(folder.glob(".checkpoint*"))
    again = make_trainer("run", resume=True, **SAVING)
    again.train()
    assert rows_of(again) == rows_of(whole)


def test_a_disk_that_fills_up_while_records_are_written_ends_the_run_in_words(make_trainer, largest_file):
    """Goes red if an OSError comes through, or the summary's own failure hides the first."""
    whole = make_trainer("whole", **SAVING)
    whole.train()
    trainer = make_trainer("run", callbacks=[At(4, lambda: largest_file(1))], **{**SAVING, "save_steps": 3})
    with pytest.raises(RunFailed, match=r"cannot be written: File too large.*--resume"):
        trainer.train()
    largest_file(resource.RLIM_INFINITY)
    assert newest_complete(Path(trainer.args.output_dir))[0].step == 3
    again = make_trainer("run", resume=True, **{**SAVING, "save_steps": 3})
    again.train()
    assert rows_of(again) == rows_of(whole)


@pytest.mark.parametrize("size", [100, 40_000], ids=["at the first record", "at the final model"])
def test_a_disk_that_is_full_before_or_after_training_is_told_in_words(make_trainer, largest_file, size):
    """Goes red if only what happens between the first and the last step is put into words."""

    class Ending(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            largest_file(size)

    run = PreparedRun(make_trainer("run", callbacks=[Ending()] if size > 100 else None, **SAVING), {})
    if size == 100:
        largest_file(size)
    with pytest.raises(RunFailed, match=r"run.* cannot be written: .*--resume"):
        run.train()
    largest_file(resource.RLIM_INFINITY)
    PreparedRun(make_trainer("run", resume=True, **SAVING), {}).train()
    assert (Path(run.trainer.args.output_dir) / "model.safetensors").exists()


def test_a_folder_that_becomes_unwritable_ends_the_run_in_words(make_trainer, monkeypatch):
    """A disk that is mounted anew as read-only. Goes red if the error is a traceback, or the checkpoints go with it."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    trainer = make_trainer(callbacks=[At(4, lambda: monkeypatch.setattr(os, "replace", refuse))], **SAVING)
    with pytest.raises(RunFailed, match=r"checkpoint 4 cannot be written.*Read-only.*--resume"):
        trainer.train()
    monkeypatch.undo()
    assert newest_complete(Path(trainer.args.output_dir))[0].step == 3
    settings = {**SAVING, "save_steps": 3}
    again = make_trainer(
        "again", callbacks=[At(4, lambda: monkeypatch.setattr(RunFolder, "append", refuse))], **settings
    )
    with pytest.raises(RunFailed, match=r"again cannot be written: Read-only.*--resume"):
        again.train()
    assert newest_complete(Path(again.args.output_dir))[0].step == 3


def test_a_failure_elsewhere_keeps_its_traceback(make_trainer):
    """Goes red if a file that a callback misses is told as a run folder that cannot be written."""

    def read():
        Path("no such file").read_text()

    with pytest.raises(FileNotFoundError):
        make_trainer(callbacks=[At(2, read)], **SAVING).train()


def test_too_little_room_for_a_checkpoint_is_said_before_the_first_step(make_trainer, monkeypatch):
    """Goes red if the moments of AdamW are not counted: 12 bytes a parameter, and here there are 10."""
    trainer = make_trainer(**SAVING)
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    usage = shutil.disk_usage(trainer.args.output_dir if Path(trainer.args.output_dir).exists() else "/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 * size))
    with pytest.raises(RequestError, match=r"a checkpoint takes about .* GiB left.*save_strategy=no"):
        trainer.train()
    make_trainer("none", save_strategy="no", max_steps=1).train()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=13 * size))
    make_trainer("enough", **{**SAVING, "max_steps": 1}).train()


class DeadlyRows:
    """A data set whose reader dies at the tenth row it reads, in a worker process."""

    column_names = ["input_ids", "labels"]

    def __init__(self, rows):
        self.rows, self.parent, self.left = rows, os.getpid(), 10

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        self.left -= os.getpid() != self.parent
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[number]


def test_the_death_of_a_worker_ends_the_run_in_words(make_trainer, demonstrations):
    """Goes red if the words of torch or of a pipe come through, which name no cause and no way on."""
    trainer = make_trainer(dataloader_num_workers=1, **SAVING)
    trainer.train_dataset = DeadlyRows(list(demonstrations))
    trainer._remove_unused_columns = lambda dataset, description: dataset
    with pytest.raises(RunFailed, match=r"worker that reads data died.*dataloader_num_workers.*--resume"):
        trainer.train()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "^DataLoader worker .* signal: Killed. A worker that reads data died",
        ),
        (EOFError(), "^EOFError. A worker that reads data died"),
        (BrokenPipeError(32, "Broken pipe"), "^what read this output is gone.*--resume"),
    ],
)
@pytest.mark.parametrize("is_saving", [True, False])
def test_what_comes_from_elsewhere_is_not_blamed_on_the_disk(make_trainer, monkeypatch, error, message, is_saving):
    """torch tells of a dead worker from a signal handler, so from any line; a pipe's end says nothing at all.

    Goes red if it is taken for the failure of a checkpoint that is being written, or if its missing text is an error.
    """
    if is_saving and isinstance(error, BrokenPipeError):
        pytest.skip("nothing is printed there")

    def fail(*args):
        raise error

    callbacks = [] if is_saving else [At(2, fail)]
    trainer = make_trainer(callbacks=callbacks, **SAVING)
    if is_saving:
        monkeypatch.setattr("psft.trainers.durable.save_state", fail)
    with pytest.raises(RunFailed, match=message):
        trainer.train()


def test_a_clock_that_jumps_back_changes_neither_order_nor_rotation(make_trainer):
    """Goes red if the newest checkpoint is found by its time."""

    def later():
        for path in folder.glob("checkpoint-*"):
            os.utime(path, (4e9, 4e9))

    trainer = make_trainer(callbacks=[At(3, later)], save_total_limit=2, **SAVING)
    folder = Path(trainer.args.output_dir)
    trainer.train()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-8"]
    assert newest_complete(folder)[0].step == 8


def test_two_runs_are_equal_to_the_bit_and_say_so(make_trainer):
    """Goes red if the mode is not switched on, is left on behind the run, or run.json does not say."""
    runs = [make_trainer(name, max_steps=6) for name in ("one", "two")]
    for trainer in runs:
        trainer.train()
        assert json.loads((Path(trainer.args.output_dir) / "run.json").read_text())["deterministic"] is True
    assert rows_of(runs[0]) == rows_of(runs[1])
    assert not torch.are_deterministic_algorithms_enabled()
    free = make_trainer("free", max_steps=1, deterministic=False)
    free.train()
    assert json.loads((Path(free.args.output_dir) / "run.json").read_text())["deterministic"] is False
