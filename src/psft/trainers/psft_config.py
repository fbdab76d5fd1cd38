"""`PSFTConfig`: every setting of a run. `trl.SFTConfig` plus `psft.config.PSFTFields`, checked together."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass

import trl
from transformers.trainer_utils import SaveStrategy

from psft.config import OBJECTIVE_SETTINGS, PSFTFields
from psft.errors import RequestError
from psft.evaluation.in_training import problems_of
from psft.objectives import Objective, resolve_objective
from psft.trainers.layout import LOSS_AGGREGATIONS
from psft.trainers.run_settings import cap_problems, run_problems, settle_determinism, settle_machine
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
        is_judged_by = self.metric_for_best_model  # as it was given: transformers fills it in
        settle_machine(self)
        with warnings.catch_warnings():  # TRL itself still sets the name that transformers renamed
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
            super().__post_init__()
        settle_determinism(self)
        problems = [*self._resolve_batch_sizes(), *self._resolve_objective(), *self._refusals()]
        problems += [*problems_of(self), *self._unselectable(is_judged_by)]
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

    def resolved_objective(self) -> Objective:
        """The objective with its settings. Raises RequestError: unknown, or a setting that has no effect on it."""
        given = {name: getattr(self, name) for name in OBJECTIVE_SETTINGS if getattr(self, name) is not None}
        return resolve_objective(self.objective, {**given, **(self.objective_settings or {})})

    @property
    def most_rows_per_step(self) -> int:
        """Rows of the largest optimizer step, all ranks: a mini-batch, or a step of the warm-up."""
        assert self.mini_batch_size is not None and self.train_batch_size is not None
        warmup = (self.sft_warmup_mini_batch_size or self.train_batch_size) if self.sft_warmup_steps else 0
        return max(self.mini_batch_size, warmup)

    def _resolve_objective(self) -> list[str]:
        """Fill in the objective's own defaults; return what is wrong about it and the controller."""
        try:
            objective = self.resolved_objective()
        except RequestError as error:
            return [str(error).rstrip(".")]
        for name in OBJECTIVE_SETTINGS:
            if name in objective.settings:
                setattr(self, name, objective.settings[name])
        return [*self._refused_without_effect(objective), *self._resolve_controller(objective)]

    def _refused_without_effect(self, objective: Objective) -> list[str]:
        problems = []
        name = self.objective
        if self.objective_settings and ":" not in name:
            problems.append(f"objective_settings are for an objective of your own; '{name}' has settings by name")
        if self.allow_ratio_noise and not objective.needs_old_logps:
            problems.append(f"allow_ratio_noise has no effect for objective '{name}', which has no ratio. Remove it")
        if not (objective.needs_ref_logps or objective.needs_ref_vocabulary):
            for setting in ("ref_model_name_or_path", "ref_cache_dir"):
                if getattr(self, setting) is not None:
                    problems.append(
                        f"{setting} has no effect for objective '{name}', which has no reference. Remove it"
                    )
        elif self.ref_cache_dir is not None and not objective.needs_ref_logps:
            problems.append(
                f"ref_cache_dir has no effect for objective '{name}': its reference is streamed, not cached. Remove it"
            )
        if self.loss_aggregation not in LOSS_AGGREGATIONS:
            problems.append(f"loss_aggregation={self.loss_aggregation} must be one of {', '.join(LOSS_AGGREGATIONS)}")
        return problems

    def _resolve_controller(self, objective: Objective) -> list[str]:
        targets = [n for n in ("target_clip_fraction", "target_drift") if getattr(self, n) is not None]
        if not targets:
            if self.controller_adjusts is not None:
                return ["controller_adjusts has no effect without target_clip_fraction or target_drift. Remove it"]
            return []
        if len(targets) == 2:
            return ["target_clip_fraction and target_drift pull one controller two ways. Give one of them"]
        (target,) = targets
        value = getattr(self, target)
        problems = []
        if not 0 < value < (1 if target == "target_clip_fraction" else math.inf):
            problems.append(
                f"{target}={value} must lie between 0 and 1"
                if target == "target_clip_fraction"
                else f"{target}={value} must be greater than 0 (nats)"
            )
        if self.controller_adjusts is None:
            self.controller_adjusts = "epsilon" if target == "target_clip_fraction" else "window"
        has_radius = bool({"epsilon_high", "tv_delta"} & set(objective.settings))
        if self.controller_adjusts not in ("epsilon", "window"):
            problems.append(f"controller_adjusts={self.controller_adjusts} must be epsilon or window")
        elif not objective.needs_old_logps:
            problems.append(f"{target} has no effect for objective '{self.objective}', which has no old policy")
        elif not has_radius and (self.controller_adjusts == "epsilon" or target == "target_clip_fraction"):
            problems.append(
                f"{target} with controller_adjusts={self.controller_adjusts} needs a bound that clips, and objective "
                f"'{self.objective}' has none. Use psft or psft_tv"
            )
        elif self.controller_adjusts == "epsilon" and math.inf in (self.epsilon_high, self.tv_delta):
            problems.append(f"{target} moves the bound from where it is, and it is inf. Give a finite one, e.g. 0.28")
        elif self.mini_batch_size == self.train_batch_size:
            problems.append(f"{target} has no effect with one mini-batch per window: every ratio is 1")
        return problems

    def _unselectable(self, metric: str | None) -> list[str]:
        """What keeps `select_best` from having a checkpoint for every score. metric: metric_for_best_model as given."""
        if self.select_best is None or not self.eval_suite:
            return []
        problems = []
        every, strategy = self.eval_suite_steps, SaveStrategy(self.save_strategy)
        if metric is not None:
            problems.append(f"select_best and metric_for_best_model={metric} each choose a best checkpoint. Give one")
        if strategy not in (SaveStrategy.STEPS, SaveStrategy.EPOCH):
            problems.append(
                f"select_best keeps the best of the checkpoints, and save_strategy={strategy.value} "
                + ("saves none" if strategy == SaveStrategy.NO else "saves by another score")
                + ". Set save_strategy=steps and save_steps, or save_strategy=epoch"
            )
        elif every is not None and strategy == SaveStrategy.EPOCH:
            problems.append(
                f"eval_suite_steps={every} does not coincide with save_strategy=epoch, and select_best needs a "
                "checkpoint for every score. Leave eval_suite_steps out: every checkpoint is evaluated then"
            )
        elif every is not None and (self.save_steps < 1 or every % self.save_steps):
            problems.append(
                f"eval_suite_steps={every} does not coincide with save_steps={self.save_steps:g}, and select_best "
                "needs a checkpoint for every score. Make it a multiple of save_steps, or leave it out: every "
                "checkpoint is evaluated then"
            )
        return problems

    def _refusals(self) -> list[str]:
        problems = run_problems(self)
        problems += cap_problems(self)
        if self.head_kernel not in ("auto", "torch", "trl"):
            problems.append(f"head_kernel={self.head_kernel} must be auto, torch or trl")
        if self.sft_warmup_steps < 0:
            problems.append(f"sft_warmup_steps={self.sft_warmup_steps} must be 0 or more")
        if not self.sft_warmup_steps:
            for name in ("sft_warmup_mini_batch_size", "sft_warmup_learning_rate", "sft_warmup_optimizer_state"):
                if getattr(self, name) is not None:
                    problems.append(f"{name} has no effect without sft_warmup_steps. Set sft_warmup_steps or remove it")
        else:
            self.sft_warmup_optimizer_state = self.sft_warmup_optimizer_state or "keep"
        if self.sft_warmup_optimizer_state not in (None, "keep", "reset"):
            problems.append(f"sft_warmup_optimizer_state={self.sft_warmup_optimizer_state} must be keep or reset")
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
