"""What keeps a run from being lost: whole checkpoints, exact resume, signals, steps whose numbers are not finite."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from psft.data.microbatch import ROW_NUMBERS
from psft.data.table import row_lengths
from psft.errors import RequestError, RunFailed, first_line, lost_a_peer, lost_a_worker
from psft.objectives import Objective
from psft.ops.precision import deterministic
from psft.runs.checkpoints import publish, rotate, staging_root
from psft.trainers.bad_steps import BadSteps
from psft.trainers.clipped_tokens import ClippedTokens
from psft.trainers.compute import use_machine
from psft.trainers.micro_batch_cap import MicroBatchCap
from psft.trainers.psft_config import PSFTConfig
from psft.trainers.recording import RunRecorder
from psft.trainers.reference import FrozenReference
from psft.trainers.resume import (
    ResumePoint,
    find_checkpoint,
    identity_of,
    position_after,
    read_resume_point,
    save_state,
)
from psft.trainers.safeguards import check_free_space, check_longest_row
from psft.trainers.stop_signal import StopSignal
from psft.trainers.trust_region import TrustRegion
from psft.trainers.watching import RunWatch
from psft.window import Schedule, Step, Window

if TYPE_CHECKING:
    from psft.trainers.benchmarks import Benchmarks


class DurableTrainer(SFTTrainer):
    """The part of `PSFTTrainer` that is not about training but about not losing it.

    train             find and check the checkpoint to go on from, take up its state, listen to signals
    _save_checkpoint  write aside, add psft's state, seal, rename, rotate
    _get_grad_norm    pass over a step that is not finite
    """

    args: PSFTConfig
    train_dataset: Any
    objective: Objective
    head_kernel: str
    attention: str  # as transformers names it
    recorder: RunRecorder
    trust_region: TrustRegion
    watch: RunWatch
    benchmarks: Benchmarks | None
    clipped_tokens: ClippedTokens | None
    reference: FrozenReference | None
    micro_batch_cap: MicroBatchCap
    _window: Window | None
    _current_step: Step | None
    _epoch: int
    _steps_in_epoch: int

    def __init__(self, model: Any, args: PSFTConfig, *positional: Any, **kwargs: Any) -> None:
        use_machine(args)
        super().__init__(model, args, *positional, **kwargs)
        self.bad_steps = BadSteps(args.max_bad_steps)
        self.stop_signal = StopSignal()
        self.add_callback(self.stop_signal)
        self.identity: dict[str, Any] = {}
        self._resume: ResumePoint | None = None
        self._staging_root: Path | None = None
        self.saved_at: int | None = None  # the step of the newest checkpoint
        self._row_lengths: tuple[Any, list[int]] | None = None  # of which data set

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of every row of the training set."""
        if self._row_lengths is None or self._row_lengths[0] is not self.train_dataset:
            self._row_lengths = (self.train_dataset, row_lengths(self.train_dataset))
        return self._row_lengths[1]

    def schedule(self) -> Schedule:
        """Every optimizer step of this run."""
        raise NotImplementedError

    def _reduce(self, tensor: Tensor, how: str) -> Tensor:
        """The "sum" or "max" of a tensor over all ranks, on every rank."""
        if self.args.world_size == 1:
            return tensor
        gathered = self.accelerator.gather(tensor.reshape(1, -1))
        return (gathered.sum(0) if how == "sum" else gathered.amax(0)).reshape(tensor.shape)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        place = super()._init_training_state(*args, **kwargs)
        if self._resume is None:
            return place
        self.args.eval_on_start = self._owes_evaluation(self._resume)
        return self._resume.position.epoch, self._resume.position.step_in_epoch  # epochs differ under a warm-up

    def _owes_evaluation(self, resume: ResumePoint) -> bool:
        """Whether held-out data was due at the checkpoint's step, but was not measured when the checkpoint was written.

        At an epoch's end the Trainer evaluates after a checkpoint of its last step; a signal leaves evaluation out.
        """
        args, state = self.args, self.state
        if self.eval_dataset is None or resume.state.get("is_evaluated", True):
            return False
        is_last = state.global_step >= state.max_steps
        if args.eval_strategy == "steps":
            return args.eval_delay <= state.global_step and (is_last or state.global_step % state.eval_steps == 0)
        is_epoch_end = resume.state["position"]["step_in_epoch"] == 0
        return args.eval_strategy == "epoch" and args.eval_delay <= state.epoch and (is_last or is_epoch_end)

    def _rest_of_window(self) -> tuple[list[Step], list[list[list[int]]], dict[Any, Tensor]] | None:
        """What a checkpoint left of the window it was taken in, once."""
        resume = self._resume
        if resume is None or self.state.global_step != resume.step:
            return None
        return resume.open_window(self)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm; where it or the loss is not finite the gradients are dropped, so that the step changes nothing."""
        norm = super()._get_grad_norm(model, grad_norm)
        assert self._window is not None and self.recorder.loss is not None
        loss = self._reduce(self.recorder.loss, "sum") / self.args.world_size
        if self.bad_steps.is_bad(loss, norm):
            rows = [row for micro_batch in self._window.mini_batch for row in micro_batch[ROW_NUMBERS]]
            rows = sorted(gather_object(rows)) if self.args.world_size > 1 else sorted(rows)
            for parameter in model.parameters():
                parameter.grad = None  # an optimizer passes over what has no gradient: neither moments nor decay
            # DeepSpeed steps inside the backward pass: its engine has passed over the step, or has taken it
            engine: Any = self.model_wrapped
            is_taken = self.is_deepspeed_enabled and bool(engine.was_step_applied())
            try:
                self.bad_steps.skip(self.state.global_step + 1, loss, norm, rows, is_taken=is_taken)
            finally:
                self.recorder.write_bad_steps()
            self.bad_steps.stop_if_too_many()
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging_root is None else str(self._staging_root)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written aside, sealed with sizes and checksums, then renamed: a checkpoint is whole or not there.

        Raises:
            RunFailed: it cannot be written; the checkpoints before it are as they were.
        """
        run, step = Path(super()._get_output_dir(trial)), self.state.global_step
        self.saved_at = step
        with self._staged(run, step) as folder:
            super()._save_checkpoint(model, trial)
            position = position_after(self, self._epoch, self._current_step, self._steps_in_epoch)
            save_state(self, folder, position, self._window)
            if self.state.best_model_checkpoint == str(folder) and self.args.should_save:
                self.state.best_model_checkpoint = str(run / folder.name)  # where it will lie
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = None if best is None else run / Path(best).name  # the run may have been moved
            rotate(run, limit=self.args.save_total_limit, keep=keep)

    @contextlib.contextmanager
    def _staged(self, run: Path, step: int) -> Iterator[Path]:
        """Let the body write into a folder aside, on every rank; then publish it from the first."""
        self._staging_root = staging_root(run, step)
        folder = self._staging_root / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging_root, ignore_errors=True)
                folder.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            yield folder
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(run, step)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._staging_root, ignore_errors=True)
            if isinstance(error, RequestError | RunFailed) or lost_a_worker(error) or lost_a_peer(error):
                raise  # it came while a checkpoint was written, but not from that
            raise RunFailed(
                f"checkpoint {step} cannot be written to {run}: {first_line(error)}. Earlier checkpoints are "
                "whole. Make room, or set save_total_limit, and go on with --resume."
            ) from error
        finally:
            self._staging_root = None

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
        is_resuming = bool(named)
        check_longest_row(self)
        self.saved_at = None
        self.micro_batch_cap.begin()
        self.identity = identity_of(self)
        path = find_checkpoint(self, None if named is True else named) if is_resuming else None
        self._resume = None if path is None else read_resume_point(self, path)
        if self._resume is not None:
            self._take_up(self._resume)
        evaluates_at_start = self.args.eval_on_start
        try:
            step = (0 if self._resume is None else self._resume.step) if is_resuming else None
            num_eval_rows = None if self._resume is None else self._resume.state.get("num_eval_rows")
            with (
                self.recorder.failures_in_words(),
                deterministic(bool(self.args.deterministic)),
                self.recorder.recording(resumed_at=step, num_eval_rows=num_eval_rows),
                self.stop_signal.listening(),
            ):
                check_free_space(self)
                return super().train(None if path is None else str(path), *args, **kwargs)
        finally:
            self.args.eval_on_start = evaluates_at_start

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # at 1 the best stays, but the newest goes
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _take_up(self, resume: ResumePoint) -> None:
        """Everything that can be put back before the Trainer has loaded weights, optimizer and random state."""
        if resume.is_same_run:
            self.trust_region.load_state_dict(resume.state["trust_region"])
        if self.reference is not None and "data" not in (self.args.allow_changed or []):
            self.reference.restore(resume.path)
        self.watch.restore(resume.path)
        self.saved_at = resume.step
        if self.benchmarks is not None:
            self.benchmarks.load_state_dict(resume.state.get("benchmarks"))
        if self.clipped_tokens is not None:
            self.clipped_tokens.restore(resume.path)
        self._total_train_tokens = resume.state["num_train_tokens"]
        self.bad_steps.in_a_row = resume.state["bad_steps_in_a_row"]
        if resume.state.get("is_evaluated"):
            self.recorder.last_evaluated_step = resume.step
