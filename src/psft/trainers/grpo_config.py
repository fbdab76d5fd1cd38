"""`GRPOStageConfig`: every setting of `psft grpo`. `trl.GRPOConfig` plus `psft.config.GRPOFields`, checked together.

    train_batch_size    256 prompts   x num_generations 8 = 2048 answers    TRL's generation_batch_size
    mini_batch_size      32 prompts   x num_generations 8 =  256 answers    one optimizer step
    per_device_train_batch_size        8 answers on a device                one forward pass

so gradient_accumulation_steps = 256 / 8 / ranks and steps_per_generation = 8 of those: 8 optimizer steps to a batch.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trl

from psft.config import GRPOFields
from psft.errors import RequestError
from psft.rewards.reward_set import RewardSet
from psft.trainers.dynamic_sampling import Limits
from psft.trainers.run_settings import run_problems, settle_determinism, settle_machine

logger = logging.getLogger(__name__)

_HF_PER_DEVICE_DEFAULT = 8
_TRANSLATED = ("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")


@dataclass(kw_only=True)
class GRPOStageConfig(GRPOFields, trl.GRPOConfig):  # type: ignore[misc]  # train_batch_size is a property there
    """`trl.GRPOConfig` as DAPO (arXiv:2503.14476) and Table 7 of the paper have it, with batches counted in prompts.

    Differs from `trl.GRPOConfig` in defaults: `epsilon_high` 0.28, `max_completion_length` 10240, dropout off, vLLM's
    importance sampling correction off (the paper has none), `bf16` on where the hardware computes it natively.

    Raises:
        RequestError: settings that contradict each other or cannot be used; all of them at once.
    """

    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "The ratio is clipped at 1 + this where the advantage is positive (Table 7)."}
    )
    max_completion_length: int | None = field(
        default=10240, metadata={"help": "Longest answer in tokens (Table 7: 10k)."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={"help": "Correct for vLLM's probabilities being others than the trained model's. Not in the paper."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout makes the ratio noise."})

    def __post_init__(self) -> None:
        settle_machine(self)
        problems = [*self._resolve_batch_sizes(), *self._refusals()]
        if problems:
            raise RequestError("; ".join(problems) + ".")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
            try:
                super().__post_init__()
            except RequestError:
                raise
            except ValueError as error:  # TRL and transformers check their own settings this way
                raise RequestError(" ".join(str(error).split())) from error
        settle_determinism(self)
        if problems := run_problems(self):
            raise RequestError("; ".join(problems) + ".")
        if self.world_size != _num_ranks():
            raise RequestError(
                f"{self.world_size} ranks train together, and WORLD_SIZE says {_num_ranks()}. Start them with "
                "--num_processes, accelerate or torchrun."
            )

    def _resolve_batch_sizes(self) -> list[str]:
        """Translate prompts into TRL's arithmetic, which counts answers; return what is wrong."""
        given = [name for name in _TRANSLATED if getattr(self, name) not in (None, 1)]
        if given:
            return [f"{', '.join(given)} follow from train_batch_size and mini_batch_size (prompts). Leave them out"]
        problems = []
        ranks = _num_ranks()
        answers = self.num_generations
        if answers is None or answers < 2:
            return [f"num_generations={answers}: a group needs 2 answers or more to be compared"]
        sizes = {"train_batch_size": self.train_batch_size, "mini_batch_size": self.mini_batch_size}
        sizes["sampling_batch_size"] = self.sampling_batch_size or self.train_batch_size
        for name, size in sizes.items():
            if size < 1 or (name != "mini_batch_size" and size % ranks):
                problems.append(f"{name}={size} must be a positive multiple of {ranks} ranks (prompts)")
        if problems:
            return problems
        if self.train_batch_size % self.mini_batch_size:
            return [
                f"train_batch_size={self.train_batch_size} must be a multiple of mini_batch_size={self.mini_batch_size}"
            ]
        of_step = self.mini_batch_size * answers
        if of_step % ranks:
            return [
                f"mini_batch_size={self.mini_batch_size} x num_generations={answers} cannot be shared by {ranks} ranks"
            ]
        share = of_step // ranks
        wanted = self.per_device_train_batch_size
        if wanted == _HF_PER_DEVICE_DEFAULT:
            wanted = max(size for size in range(1, min(wanted, share) + 1) if share % size == 0)
        if wanted < 1 or share % wanted:
            return [
                f"per_device_train_batch_size={wanted} (answers of one forward pass) must divide {share}, the answers "
                f"of a mini-batch on each of {ranks} ranks"
            ]
        self.per_device_train_batch_size = wanted
        self.gradient_accumulation_steps = share // wanted
        self.steps_per_generation = self.gradient_accumulation_steps * (self.train_batch_size // self.mini_batch_size)
        self.generation_batch_size = None  # follows
        return []

    def _refusals(self) -> list[str]:
        problems = []
        if self.on_reward_failure is None:
            self.on_reward_failure = "drop_group" if self.dynamic_sampling else "zero_and_count"
        elif self.on_reward_failure == "drop_group" and not self.dynamic_sampling:
            problems.append(
                "on_reward_failure=drop_group needs dynamic_sampling, which takes another prompt. Use zero_and_count"
            )
        longest = self.max_completion_length or 0
        if longest < 1:
            problems.append(f"max_completion_length={self.max_completion_length} must be 1 or more tokens")
        if self.overlong_buffer is None:
            self.overlong_buffer = longest // 5
        if not 0 <= self.overlong_buffer <= longest:
            problems.append(
                f"overlong_buffer={self.overlong_buffer} must lie between 0 and max_completion_length={longest}"
            )
        if not self.overlong_weight > 0:
            problems.append(
                f"overlong_weight={self.overlong_weight:g} must be above 0; overlong_buffer=0 switches it off"
            )
        if "overlong" in (self.rewards or {}):
            problems.append("overlong among the rewards: it is set by overlong_buffer and overlong_weight")
        if self.reward_std_tolerance < 0:
            problems.append(f"reward_std_tolerance={self.reward_std_tolerance:g} must be 0 or more")
        if self.max_sampling_rounds < 1:
            problems.append(f"max_sampling_rounds={self.max_sampling_rounds} must be 1 or more")
        sampled = (self.sampling_batch_size or self.train_batch_size) * self.max_sampling_rounds
        if self.dynamic_sampling and sampled < self.train_batch_size:
            problems.append(
                f"max_sampling_rounds={self.max_sampling_rounds} rounds of sampling_batch_size="
                f"{self.sampling_batch_size} prompts can never fill train_batch_size={self.train_batch_size}"
            )
        if not self.dynamic_sampling and self.sampling_batch_size not in (None, self.train_batch_size):
            problems.append("sampling_batch_size has no effect without dynamic_sampling. Remove it")
        if self.dynamic_sampling and self.scale_rewards not in ("group", "none", True, False):
            problems.append(
                f"scale_rewards={self.scale_rewards} takes the spread over a batch from which dynamic_sampling drops "
                "groups later. Use group or none"
            )
        if self.multi_objective_aggregation != "sum_then_normalize" and self.dynamic_sampling:
            problems.append(
                f"multi_objective_aggregation={self.multi_objective_aggregation} mixes groups that dynamic_sampling "
                "drops later. Use sum_then_normalize"
            )
        if self.reward_weights is not None:
            problems.append("reward_weights belong to the rewards: rewards=math=1,format=0.1")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            problems.append(f"max_prompt_length={self.max_prompt_length} must be 1 or more tokens")
        known = ["total", *(self.rewards or {}), *(["overlong"] if self.overlong_buffer else [])]
        if self.rewards is not None and self.dynamic_sampling_by not in known:
            problems.append(f"dynamic_sampling_by={self.dynamic_sampling_by} must be one of {', '.join(known)}")
        return problems

    @property
    def limits(self) -> Limits:
        """What dynamic sampling has to keep to."""
        return Limits(
            self.train_batch_size,
            (self.sampling_batch_size or self.train_batch_size) if self.dynamic_sampling else self.train_batch_size,
            self.max_sampling_rounds if self.dynamic_sampling else 1,
            num_ranks=_num_ranks(),
            is_dynamic=self.dynamic_sampling,
        )

    def reward_set(self, functions: Mapping[str, Callable[..., Any]] | None = None) -> RewardSet:
        """The rewards of the run, the overlong punishment among them. functions: Python callables, weight 1 each unless
        `rewards` names them.

        Raises:
            RequestError: none, or one that cannot be used.
        """
        weights = {**dict.fromkeys(functions or {}, 1.0), **(self.rewards or {})}
        settings = dict(self.reward_settings or {})
        if weights and self.overlong_buffer:
            weights["overlong"] = self.overlong_weight
            settings["overlong"] = {"buffer": self.overlong_buffer}
        assert self.max_completion_length is not None and self.on_reward_failure is not None
        return RewardSet(
            weights,
            settings,
            max_completion_length=self.max_completion_length,
            on_failure=self.on_reward_failure,
            time_limit=self.reward_time_limit,
            num_workers=self.reward_workers,
            functions=functions,
        )


def _num_ranks() -> int:
    """Processes of this job, as every launcher tells them; TRL checks its arithmetic before transformers knows."""
    return int(os.environ.get("WORLD_SIZE") or 1)
