"""`PSFTConfig`: every setting of a run. `trl.SFTConfig` plus `psft.config.PSFTFields`, checked together."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import torch
import trl

from psft.config import PSFTFields
from psft.errors import RequestError
from psft.ops.precision import has_native_bf16
from psft.window.schedule import check_batch_sizes

logger = logging.getLogger(__name__)

DEFAULT_TRAIN_BATCH_SIZE = 256
DEFAULT_MINI_BATCH_SIZE = 32
_HF_PER_DEVICE_DEFAULT = 8  # of `per_device_train_batch_size` in transformers: what "not given" looks like


@dataclass(kw_only=True)
class PSFTConfig(PSFTFields, trl.SFTConfig):  # type: ignore[misc]  # train_batch_size is a property there
    """`trl.SFTConfig` for Proximal SFT; a script that uses the one works with the other.

    Batches are counted in sequences over all ranks: `train_batch_size` share one old policy, `mini_batch_size` make an
    optimizer step, and each step is cut into micro-batches of at most `max_tokens_per_micro_batch` padded tokens. A
    script that gives TRL's `per_device_train_batch_size` and `gradient_accumulation_steps` keeps its step size: their
    product over all ranks becomes `mini_batch_size`, and the window is 8 of those unless `train_batch_size` is given.

    Differs from `trl.SFTConfig` in defaults: the step size above (32, not 8 per device), and `bf16`, which is on where
    the hardware computes it natively and off elsewhere (an emulated one is slower than float32).

    Raises:
        RequestError: settings that contradict each other or cannot be combined with a window; all of them at once.
    """

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            self.bf16 = has_native_bf16()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses bf16 on a CPU unless told so
        with warnings.catch_warnings():  # TRL itself still sets the name that transformers renamed
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
            super().__post_init__()
        problems = [*self._resolve_batch_sizes(), *self._refusals()]
        if problems:
            raise RequestError("; ".join(problems))

    def _resolve_batch_sizes(self) -> list[str]:
        """Fill in batch sizes and translate TRL's arithmetic; return what is wrong."""
        per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        is_given = (self.per_device_train_batch_size, self.gradient_accumulation_steps) != (_HF_PER_DEVICE_DEFAULT, 1)
        if self.mini_batch_size is None and is_given:
            self.mini_batch_size = per_step
            self.train_batch_size = self.train_batch_size or 8 * per_step
            logger.info(
                "per_device_train_batch_size x gradient_accumulation_steps x ranks = %d became mini_batch_size; "
                "train_batch_size is %d.", per_step, self.train_batch_size,
            )  # fmt: skip
        elif is_given and per_step != self.mini_batch_size:
            return [
                f"mini_batch_size={self.mini_batch_size} contradicts per_device_train_batch_size="
                f"{self.per_device_train_batch_size} x gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} x {self.world_size} ranks = {per_step}. Give mini_batch_size alone"
            ]
        self.mini_batch_size = self.mini_batch_size or min(DEFAULT_MINI_BATCH_SIZE, self.train_batch_size or 10**9)
        self.train_batch_size = self.train_batch_size or DEFAULT_TRAIN_BATCH_SIZE
        try:
            check_batch_sizes(self.train_batch_size, self.mini_batch_size)
        except RequestError as error:
            return [str(error).rstrip(".")]
        if self.mini_batch_size % self.world_size:
            return [
                f"mini_batch_size={self.mini_batch_size} cannot be shared by {self.world_size} ranks. "
                f"Use a multiple of {self.world_size}"
            ]
        # What transformers and DeepSpeed read: one "batch" of theirs is the rank's share of a mini-batch.
        self.per_device_train_batch_size = self.mini_batch_size // self.world_size
        self.gradient_accumulation_steps = 1
        return []

    def _refusals(self) -> list[str]:
        problems = []
        if not self.epsilon_high > 0:
            problems.append(f"epsilon_high={self.epsilon_high} must be greater than 0; the paper uses 0.28")
        if self.max_tokens_per_micro_batch != "auto":
            try:
                self.max_tokens_per_micro_batch = int(self.max_tokens_per_micro_batch)
            except ValueError:
                self.max_tokens_per_micro_batch = 0
            if self.max_tokens_per_micro_batch < 1:
                problems.append("max_tokens_per_micro_batch must be a number of tokens or auto")
        if self.sft_warmup_steps < 0:
            problems.append(f"sft_warmup_steps={self.sft_warmup_steps} must be 0 or more")
        if not self.sft_warmup_steps:
            for name in ("sft_warmup_mini_batch_size", "sft_warmup_learning_rate"):
                if getattr(self, name) is not None:
                    problems.append(f"{name} has no effect without sft_warmup_steps. Set sft_warmup_steps or remove it")
        warmup_mini = self.sft_warmup_mini_batch_size
        if warmup_mini is not None and (warmup_mini < 1 or warmup_mini % self.world_size):
            problems.append(
                f"sft_warmup_mini_batch_size={warmup_mini} must be a positive multiple of {self.world_size} ranks"
            )
        if self.label_smoothing_factor:
            problems.append(
                f"label_smoothing_factor={self.label_smoothing_factor} cannot be combined with PSFT: the ratio is of "
                "demonstrated tokens alone. Set it to 0"
            )
        if self.loss_type != "nll":
            problems.append(
                f"loss_type='{self.loss_type}' is TRL's way to choose a loss. Use objective='{self.loss_type}'"
            )
        if self.auto_find_batch_size:
            problems.append(
                "auto_find_batch_size would change a window while it is open. Use max_tokens_per_micro_batch"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            problems.append(
                f"train_sampling_strategy='{self.train_sampling_strategy}' decides what shares a mini-batch by length. "
                "Use random or sequential; rows are sorted by length inside each mini-batch anyway"
            )
        parallelism = getattr(self, "parallelism_config", None)
        if parallelism is not None and getattr(parallelism, "cp_enabled", False):
            what = "context parallelism with packing" if self.packing else "context parallelism"
            problems.append(f"{what} splits sequences whose old log-probs a window keeps whole. Set cp_size to 1")
        if parallelism is not None and getattr(parallelism, "sp_enabled", False):
            problems.append("Ulysses sequence parallelism computes the loss inside the engine. Set sp_size to 1")
        return problems

    @property
    def auto_tokens_per_micro_batch(self) -> int:
        """Where "auto" starts: 1024 padded tokens on CPU (fastest in our measurements), 8192 on an accelerator."""
        return 1024 if torch.device(self.device).type == "cpu" else 8192
