"""What the stages after fine-tuning share: run folder, whole checkpoints, resume, signals, probe, alerts and rules."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

from psft.data.table import dataset_digest
from psft.errors import RequestError, RunFailed
from psft.ops.precision import deterministic
from psft.runs.folder import to_json
from psft.trainers.durability import Durability
from psft.trainers.recording import RunRecorder
from psft.trainers.resume import (
    FORMAT,
    STATE_FILE,
    check_identity,
    engine_of,
    find_checkpoint,
    read_state,
    watched_settings,
)
from psft.trainers.safeguards import check_free_space
from psft.trainers.trackers import keep_for_trackers
from psft.trainers.watching import RunWatch

logger = logging.getLogger(__name__)


class StageRecorder(RunRecorder):
    """The recorder of a stage: what is trained is asked of the trainer (`StageTrainer.method_info`)."""

    trainer: Any

    def _method_info(self) -> dict[str, Any]:
        return {"stage": self.trainer.stage, **self.trainer.method_info(), "warmup": None}

    def _memory_ran_out(self, error: BaseException) -> RunFailed:
        first = str(error).splitlines()[0][:200]
        return RunFailed(
            f"memory ran out in a step ({first}). {self.trainer.memory_advice} The last complete checkpoint is as it "
            "was: go on with --resume."
        )


class StageTrainer(Durability):
    """A mixin that stands before a trainer of TRL's in the list of bases.

        class DPOStageTrainer(StageTrainer, trl.DPOTrainer)

    The trainer below supplies what is its own:

        stage               its command's name
        method_info()       objective and what else run.json says about the method
        batch_settings()    what decides which rows make a step, part of the run's identity
        step_row(...)       the row of metrics.jsonl once a step is done
        stage_state()       what its checkpoints hold beside the Trainer's files, as JSON
        take_up(...)        puts that back
        begins(path)        before the first step, weights still as they were given

    A run goes on where transformers' Trainer does: weights, optimizer, schedule, random state, and its place in the
    data by the number of steps. `_run_epoch` sees to the probe.
    """

    stage = ""
    benchmarks = None  # while training: of psft train alone
    _metrics: dict[str, Any]  # of TRL's trainer: what is logged next
    memory_advice = "Lower max_tokens_per_micro_batch."
    recorder: StageRecorder

    def __init__(self, *positional: Any, **kwargs: Any) -> None:
        super().__init__(*positional, **kwargs)
        self.recorder = StageRecorder(self)  # type: ignore[arg-type]  # asks of a trainer what a stage has
        self.watch = RunWatch(self)  # type: ignore[arg-type]
        self._is_resumed = False

    def method_info(self) -> dict[str, Any]:
        raise NotImplementedError

    def batch_settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def step_row(self, grad_norm: Any, learning_rate: float | None) -> dict[str, Any] | None:
        """The row of the step that is done, or None where none was taken since the last."""
        raise NotImplementedError

    def stage_state(self) -> dict[str, Any]:
        return {}

    def take_up(self, path: Path, state: dict[str, Any]) -> None:
        """Put back what `stage_state` gave, and what `_save_state` wrote into `path`."""

    def begins(self, path: Path | None) -> None:
        """Called on every rank before the Trainer loads the checkpoint `path`, if there is one."""

    def identity_of_run(self) -> dict[str, Any]:
        """What the numbers of the run follow from, by the names of `psft.config.CHANGES`, and watched settings."""
        args = self.args
        return to_json(
            {
                "data": dataset_digest(self.train_dataset),
                "objective": self.method_info()["objective"],
                "batch_sizes": self.batch_settings(),
                "world_size": args.world_size,
                "seed": {"seed": args.seed, "data_seed": args.data_seed},
                "watched": watched_settings(args),
            }
        )

    def _save_state(self, folder: Path) -> None:
        if not self.is_world_process_zero():
            return
        self.watch.save(folder)
        state = {
            "format": FORMAT,
            "stage": self.stage,
            "step": self.state.global_step,
            "engine": engine_of(self),
            "identity": self.identity,
            "num_train_tokens": self._total_train_tokens,
            "bad_steps_in_a_row": self.bad_steps.in_a_row,
            "is_evaluated": self.recorder.last_evaluated_step == self.state.global_step,
            "num_eval_rows": self.recorder.num_eval_rows,
            **self.stage_state(),
        }
        (folder / STATE_FILE).write_text(json.dumps(state, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; the run folder in `output_dir` gets run.json, metrics.jsonl, eval.jsonl and summary.json.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest complete one in `output_dir` (then
                the run starts at the beginning if there is none). Default: `args.resume`.
        Raises:
            RequestError: `output_dir` holds another run, or the checkpoint is not one of this run.
            RunFailed: the run cannot go on; what was complete stays.
        """
        named: Any = resume_from_checkpoint or self.args.resume_from_checkpoint or self.args.resume
        self.identity = self.identity_of_run()
        path = find_checkpoint(self, None if named is True else named) if named else None
        state = None if path is None else self._read_checkpoint(path)
        evaluates_at_start = self.args.eval_on_start
        self._owes_evaluation = state is None or not state.get("is_evaluated", True)
        self._is_resumed = state is not None
        try:
            step = (0 if state is None else int(state["step"])) if named else None
            with (
                self.recorder.failures_in_words(),
                deterministic(bool(self.args.deterministic)),
                self.recorder.recording(
                    resumed_at=step, num_eval_rows=None if state is None else state.get("num_eval_rows")
                ),
                self.stop_signal.listening(),
            ):
                check_free_space(self)
                self.begins(path)
                return super().train(None if path is None else str(path), *args, **kwargs)
        finally:
            self.args.eval_on_start = evaluates_at_start

    def _read_checkpoint(self, path: Path) -> dict[str, Any]:
        state = read_state(self, path)
        if state.get("stage") != self.stage:
            raise RequestError(
                f"checkpoint {path} was written by psft {state.get('stage', 'train')}, and this is psft {self.stage}. "
                f"To start from its weights give it as --model_name_or_path, and another --output_dir."
            )
        changed = check_identity(self, path, state["identity"], onward="from the next step on")
        if changed:
            logger.warning("%s changed: the run goes on at step %d, not to the same bits.", ", ".join(changed),
                           state["step"] + 1)  # fmt: skip
        self.watch.restore(path)
        self._total_train_tokens = state["num_train_tokens"]
        self.bad_steps.in_a_row = state["bad_steps_in_a_row"]
        if state.get("is_evaluated"):
            self.recorder.last_evaluated_step = int(state["step"])
        self.take_up(path, state)
        return state

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        place = super()._init_training_state(*args, **kwargs)
        if self._is_resumed:
            is_epoch_end = float(self.state.epoch or 0.0).is_integer()
            self.args.eval_on_start = self._owes_evaluation and self._is_evaluation_due(is_epoch_end=is_epoch_end)
        return place

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.watch.begins()
        self.watch.makes_up()
        is_over = self.stop_signal.number is not None  # it came before the first step
        is_over |= self.state.global_step >= self.state.max_steps  # resumed at the end
        is_over |= self._is_resumed and self.control.should_training_stop  # what was made up for meets a rule
        if is_over:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.makes_up()  # a run that goes on from its end has no epoch left
        self._tr_loss = self._reduce(self._tr_loss, "sum") / self.args.world_size  # else this rank's own is reported
        return super()._finalize_training(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, epoch: Any, *args: Any, **kwargs: Any
    ) -> None:
        row = self.step_row(grad_norm, kwargs.get("learning_rate"))
        if row is not None:
            self.recorder.append_step(row)
            keep_for_trackers(self._metrics["train"], row)
            self.watch.step_ends(row)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)
