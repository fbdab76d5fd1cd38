"""A PSFT run goes on to the same bits: its state is taken down with every checkpoint, and taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from trl import SFTTrainer

from psft.data.microbatch import ROW_NUMBERS
from psft.data.table import row_lengths
from psft.objectives import Objective
from psft.ops.precision import deterministic
from psft.trainers.clipped_tokens import ClippedTokens
from psft.trainers.compute import use_machine
from psft.trainers.durability import Durability
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
from psft.trainers.trust_region import TrustRegion
from psft.trainers.watching import RunWatch
from psft.window import Schedule, Step, Window

if TYPE_CHECKING:
    from psft.trainers.benchmarks import Benchmarks


class DurableTrainer(Durability, SFTTrainer):
    """The part of `PSFTTrainer` that is not about training but about not losing it.

    train         find and check the checkpoint to go on from, take up its state, listen to signals
    _save_state   the place in the data, the open window, the trust region, ... into every checkpoint
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
        self._resume: ResumePoint | None = None
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
        if resume.state.get("is_evaluated", True):
            return False
        return self._is_evaluation_due(is_epoch_end=resume.state["position"]["step_in_epoch"] == 0)

    def _rest_of_window(self) -> tuple[list[Step], list[list[list[int]]], dict[Any, Tensor]] | None:
        """What a checkpoint left of the window it was taken in, once."""
        resume = self._resume
        if resume is None or self.state.global_step != resume.step:
            return None
        return resume.open_window(self)

    def _rows_of_step(self) -> list[int]:
        assert self._window is not None
        return [row for micro_batch in self._window.mini_batch for row in micro_batch[ROW_NUMBERS]]

    def _save_state(self, folder: Path) -> None:
        position = position_after(self, self._epoch, self._current_step, self._steps_in_epoch)
        save_state(self, folder, position, self._window)

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
