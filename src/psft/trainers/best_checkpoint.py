"""Which checkpoint of a run has the highest score: remembered over a resume, linked as RUN/best, never rotated away."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psft.evaluation.in_training import Selection
from psft.runs.checkpoints import link_best, rotate

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer

logger = logging.getLogger(__name__)


class BestCheckpoint:
    """What `select_best` found so far.

    step, score: of the best checkpoint; None before there is one. Of equal scores the earlier step counts: it has
    drifted less. settings: what the scores follow from beside the weights; scores of other settings do not compare.
    """

    def __init__(self, trainer: PSFTTrainer, selection: Selection, settings: str) -> None:
        self.trainer = trainer
        self.selection = selection
        self.settings = settings
        self.step: int | None = None
        self.score: float | None = None

    @property
    def _run(self) -> Path:
        return Path(str(self.trainer.args.output_dir))

    def offer(self, step: int, score: float) -> bool:
        """Take the checkpoint of this step, which is there, if its score is higher. Returns whether it was."""
        if self.score is not None and score <= self.score:
            return False
        self.step, self.score = step, score
        self._tell()
        if self.trainer.args.should_save:
            kept = self._run / f"checkpoint-{step}"
            rotate(self._run, limit=self.trainer.args.save_total_limit, keep=kept)  # the best before it may go now
        return True

    def _tell(self) -> None:
        """Let the Trainer know, with its own words, and whoever looks into the folder."""
        state, args = self.trainer.state, self.trainer.args
        self.trainer.recorder.best_checkpoint = self._summary()
        path = None if self.step is None else self._run / f"checkpoint-{self.step}"
        state.best_global_step, state.best_metric = self.step, self.score
        state.best_model_checkpoint = None if path is None else str(path)
        if not args.should_save:
            return
        try:
            link_best(self._run, self.step)
        except OSError as error:
            logger.warning(
                "the best checkpoint is %s, but %s/best cannot be made a link to it: %s.",
                path, self._run, error.strerror,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Survives JSON."""
        return {"by": self.selection.name, "settings": self.settings, "step": self.step, "score": self.score}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up what a checkpoint knew; scores of other settings, or of a checkpoint that is gone, are left."""
        self.step = self.score = None
        if state is None or state["step"] is None:
            return
        if state["settings"] != self.settings or state["by"] != self.selection.name:
            logger.warning(
                "select_best: the best so far, step %d, was found by %s under other settings. The best from here on is "
                "chosen among later checkpoints.", state["step"], state["by"],
            )  # fmt: skip
        elif not (self._run / f"checkpoint-{state['step']}").is_dir():
            logger.warning("select_best: checkpoint-%d, the best so far, is gone.", state["step"])
        else:
            self.step, self.score = state["step"], state["score"]

    def resumed(self) -> None:
        """Once the Trainer has its state: what the folder says of a best after this point no longer holds."""
        self._tell()

    def _summary(self) -> dict[str, Any] | None:
        """As summary.json names it."""
        return None if self.step is None else {"step": self.step, "by": self.selection.name, "score": self.score}
