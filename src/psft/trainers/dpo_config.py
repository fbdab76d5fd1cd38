"""`DPOStageConfig`: every setting of a DPO run. `trl.DPOConfig` plus `psft.config.DPOFields`, checked together."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any

import trl

from psft.config import TRUNCATIONS, DPOFields
from psft.errors import RequestError
from psft.trainers.run_settings import (
    cap_problems,
    parallelism_problems,
    run_problems,
    settle_determinism,
    settle_machine,
)

DEFAULT_TRAIN_BATCH_SIZE = 64
_HF_PER_DEVICE_DEFAULT = 8
_LOSS_SETTINGS = (
    "beta", "loss_type", "loss_weights", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
    "use_weighting", "discopop_tau",
)  # fmt: skip
_NOT_OF_ONE_PAIR = ("aot", "aot_unpaired", "sft")
"""Losses of TRL's that sort or average over all pairs, or tokens, of a forward pass."""


def _paper(name: str, default: Any) -> Any:
    """The field of `trl.DPOConfig` with another default."""
    known = {item.name: item for item in dataclasses.fields(trl.DPOConfig)}
    return field(default=default, metadata=known[name].metadata)


@dataclass(kw_only=True)
class DPOStageConfig(DPOFields, trl.DPOConfig):  # type: ignore[misc]  # train_batch_size is a property there
    """`trl.DPOConfig` for the stage after fine-tuning; a script that uses the one works with the other.

    Differs in defaults. From the paper (arXiv:2508.17784, table 9): beta 0.01, learning rate 5e-7, batch 64, one epoch,
    cut-off 4k. Ours: reference log-probs are computed once, before the first step; bf16 only where the hardware has it.

    `train_batch_size` pairs (all ranks) make an optimizer step, cut into micro-batches of at most
    `max_tokens_per_micro_batch` padded tokens. TRL's `per_device_train_batch_size` x `gradient_accumulation_steps` x
    ranks becomes `train_batch_size` where it is given instead.

    Raises:
        RequestError: settings that contradict each other; all of them at once.
    """

    beta: float = _paper("beta", 0.01)
    learning_rate: float = _paper("learning_rate", 5e-7)
    num_train_epochs: float = _paper("num_train_epochs", 1.0)
    max_length: int | None = _paper("max_length", 4096)
    precompute_ref_log_probs: bool = _paper("precompute_ref_log_probs", True)

    def __post_init__(self) -> None:
        settle_machine(self)
        with warnings.catch_warnings():  # TRL itself still sets the name that transformers renamed
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
            super().__post_init__()
        settle_determinism(self)
        problems = [*self._resolve_batch_size(), *run_problems(self), *cap_problems(self), *self._refusals()]
        if problems:
            raise RequestError("; ".join(problems))

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The settings that say what is minimised, without those left at a value that switches them off."""
        values = {name: getattr(self, name) for name in _LOSS_SETTINGS}
        defaults = {item.name: item.default for item in dataclasses.fields(trl.DPOConfig)}
        always = {"beta", "loss_type"}
        return {name: value for name, value in values.items() if name in always or value != defaults[name]}

    def _resolve_batch_size(self) -> list[str]:
        """Fill in the batch size and translate TRL's arithmetic; return what is wrong."""
        per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        is_given = (self.per_device_train_batch_size, self.gradient_accumulation_steps) != (_HF_PER_DEVICE_DEFAULT, 1)
        if is_given and self.train_batch_size not in (None, per_step):
            return [
                f"train_batch_size={self.train_batch_size} contradicts per_device_train_batch_size="
                f"{self.per_device_train_batch_size} x gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} x {self.world_size} ranks = {per_step}. Give the first alone"
            ]
        if self.train_batch_size is None:
            self.train_batch_size = per_step if is_given else DEFAULT_TRAIN_BATCH_SIZE
        if self.train_batch_size < 1 or self.train_batch_size % self.world_size:
            return [
                f"train_batch_size={self.train_batch_size} cannot be shared by {self.world_size} ranks. "
                f"Use a positive multiple of {self.world_size}"
            ]
        # What transformers and DeepSpeed read: one "batch" of theirs is the rank's share of a step.
        self.per_device_train_batch_size = self.train_batch_size // self.world_size
        self.gradient_accumulation_steps = 1
        return []

    def _refusals(self) -> list[str]:
        problems = parallelism_problems(self)
        if not self.beta > 0:
            problems.append(f"beta={self.beta} must be greater than 0")
        if self.truncation not in TRUNCATIONS:
            problems.append(f"truncation={self.truncation} must be one of {', '.join(TRUNCATIONS)}")
        if self.truncation_mode != "keep_start":
            problems.append(
                f"truncation_mode={self.truncation_mode} is TRL's setting. Use truncation={' or '.join(TRUNCATIONS)}"
            )
        if self.padding_free:
            problems.append("padding_free is not available for DPO: TRL's trainer has no such path. Set it to false")
        if self.sync_ref_model:
            problems.append(
                "sync_ref_model moves the reference while the run goes on, and a checkpoint does not hold it. "
                "Set it to false"
            )
        if self.auto_find_batch_size:
            problems.append("auto_find_batch_size would change the batch of a run. Use max_tokens_per_micro_batch")
        if self.train_sampling_strategy not in ("random", "sequential"):
            problems.append(
                f"train_sampling_strategy='{self.train_sampling_strategy}' decides what shares a step by length. "
                "Use random or sequential; pairs are sorted by length inside each step anyway"
            )
        refused = [name for name in self.loss_type if name in _NOT_OF_ONE_PAIR]
        if refused:
            problems.append(
                f"loss_type={','.join(refused)} mixes the pairs of a micro-batch, so it would depend on how a step is "
                "cut. Use sigmoid (DPO), ipo, hinge, or another loss of single pairs"
            )
        return problems
