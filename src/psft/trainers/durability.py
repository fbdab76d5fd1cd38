"""What keeps any run from being lost, whatever it trains: whole checkpoints, and steps whose numbers are not finite."""

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

from psft.errors import RequestError, RunFailed, first_line, lost_a_peer, lost_a_worker
from psft.runs.checkpoints import publish, rotate, staging_root
from psft.trainers.bad_steps import BadSteps
from psft.trainers.recording import RunRecorder
from psft.trainers.stop_signal import StopSignal

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class Durability(_Trainer):
    """A mixin that stands before a trainer of TRL's in the list of bases.

    _save_checkpoint  write aside, add psft's state (`_save_state`), seal, rename, rotate
    _get_grad_norm    pass over a step that is not finite; `_rows_of_step` names its rows
    """

    args: Any
    recorder: RunRecorder

    def __init__(self, *positional: Any, **kwargs: Any) -> None:
        super().__init__(*positional, **kwargs)
        self.bad_steps = BadSteps(self.args.max_bad_steps)
        self.stop_signal = StopSignal()
        self.add_callback(self.stop_signal)
        self.identity: dict[str, Any] = {}
        self._staging_root: Path | None = None
        self.saved_at: int | None = None  # the step of the newest checkpoint

    def _save_state(self, folder: Path) -> None:
        """Write what the Trainer's own files lack into a checkpoint's folder. Called on every rank."""
        raise NotImplementedError

    def _rows_of_step(self) -> list[int]:
        """Numbers of the rows of the training data that this rank trained on in the current step."""
        raise NotImplementedError

    def _reduce(self, tensor: Tensor, how: str) -> Tensor:
        """The "sum" or "max" of a tensor over all ranks, on every rank."""
        if self.args.world_size == 1:
            return tensor
        gathered = self.accelerator.gather(tensor.reshape(1, -1))
        return (gathered.sum(0) if how == "sum" else gathered.amax(0)).reshape(tensor.shape)

    def _is_evaluation_due(self, *, is_epoch_end: bool) -> bool:
        """Whether held-out data is to be measured at the present step, by the settings."""
        args, state = self.args, self.state
        if self.eval_dataset is None:
            return False
        is_last = state.global_step >= state.max_steps
        if args.eval_strategy == "steps":
            return args.eval_delay <= state.global_step and (is_last or state.global_step % state.eval_steps == 0)
        epoch = state.epoch or 0.0
        return args.eval_strategy == "epoch" and args.eval_delay <= epoch and (is_last or is_epoch_end)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm; where it or the loss is not finite the gradients are dropped, so that the step changes nothing."""
        norm = super()._get_grad_norm(model, grad_norm)
        assert self.recorder.loss is not None
        loss = self._reduce(self.recorder.loss, "sum") / self.args.world_size
        if self.bad_steps.is_bad(loss, norm):
            rows = self._rows_of_step()
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
            self._save_state(folder)
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

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # at 1 the best stays, but the newest goes
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
