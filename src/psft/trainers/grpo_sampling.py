"""`trl.GRPOTrainer` whose batches are filled by dynamic sampling, and whose rewards cannot hang or fail in silence.

What is overridden of TRL, and made for version 1.16 of it (another one is refused):

    get_train_dataloader               counts steps alone: prompts come from `PromptStream`, each once an epoch
    _calculate_rewards                 notes the rewards of a round, by which groups are kept or dropped
    _generate_and_score_completions    in training: rounds of TRL's own, until `fill_batch` has a batch; then the kept
                                       groups of all rounds as one batch, from which TRL goes on as ever

Every rank samples its part of a round, in rank order, so that all of a group's answers lie on one rank. What a rank has
beyond its share of the batch goes to ranks that lack some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from psft.data.prompts import fields_of
from psft.errors import RequestError
from psft.rewards.reward_set import Answered, Failure
from psft.trainers.dynamic_sampling import Filled, GroupLedger, Plan, PromptStream, Round, fill_batch, is_informative
from psft.trainers.grpo_config import GRPOStageConfig
from psft.trainers.rollout_groups import Group, join_groups, num_counted, silenced, split_groups

_MADE_FOR = "1.16"
_OF_TRL = ("trainer_state", "log_extra", "log_metric", "environments")
"""What TRL passes to a reward besides columns."""


class SamplingTrainer(trl.GRPOTrainer):
    """Trains on prompts with `GRPOStageConfig`.

    Args:
        reward_funcs: Python callables with TRL's signature, besides `args.rewards`; called in this process, so that no
            time limit holds for them.
        train_dataset: rows with `prompt` (messages) and what the rewards need.
        others: as `trl.GRPOTrainer` takes them.
    Raises:
        RequestError: another version of TRL, no reward, or fewer prompts than a round samples.
    """

    args: GRPOStageConfig
    train_dataset: Any
    model: Any
    num_generations: int
    num_generations_eval: int

    def __init__(
        self,
        model: Any,
        args: GRPOStageConfig,
        train_dataset: Any,
        *,
        reward_funcs: Callable[..., Any] | list[Callable[..., Any]] | None = None,
        **others: Any,
    ) -> None:
        require_known_trl()
        if not isinstance(args, GRPOStageConfig):
            raise RequestError(f"args is a {type(args).__name__}; give a psft.GRPOStageConfig (same fields and more).")
        self.limits = args.limits
        self.rewards = args.reward_set(_by_name(reward_funcs))
        self._check_dataset(train_dataset)
        args.reward_weights = [self.rewards.weights[name] for name in self.rewards.names]
        self.stream = PromptStream(len(train_dataset), args.seed, is_shuffled=args.shuffle_dataset is not False)
        self.ledger = GroupLedger()
        self._groups: dict[int, Group] = {}  # serial -> the good groups that lie on this rank
        self._fillers: list[Group] = []
        self._round_rewards: Tensor | None = None  # (answers of all ranks, rewards)
        self._failed: set[int] = set()  # answers of this rank whose group is dropped
        self.filled: Filled | None = None
        self.round_failures: list[Failure] = []
        self.round_answers: list[Answered] = []  # of this rank
        super().__init__(
            model,
            reward_funcs=[_Reward(self, name) for name in self.rewards.names],
            args=args,
            train_dataset=train_dataset,
            **others,
        )
        args.reward_weights = None

    def _check_dataset(self, dataset: Any) -> None:
        if dataset is None or not hasattr(dataset, "__len__"):
            raise RequestError("train_dataset must be a data set of known length with a column `prompt`.")
        if len(dataset) < self.limits.sampling_batch_size:
            raise RequestError(
                f"the data has {len(dataset)} prompts, and {self.limits.sampling_batch_size} are sampled at once. "
                "Lower train_batch_size, or give more prompts."
            )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """An item for every forward pass of an epoch, an epoch being as many batches as the data has prompts for. With
        dynamic sampling prompts are used up faster; `stream.epoch` tells."""
        assert self.args.steps_per_generation is not None
        num_batches = len(self.train_dataset) // self.limits.batch_size
        num_passes = num_batches * self.args.steps_per_generation * self.num_iterations
        return DataLoader(range(num_passes), batch_size=1, generator=torch.Generator(), collate_fn=list)  # type: ignore[arg-type]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        return self._next_batch() if self.model.training else super()._generate_and_score_completions(inputs)

    def _next_batch(self) -> dict[str, Any]:
        """Fill a batch, and give this rank's share of it."""
        self._fillers = []
        self.filled = fill_batch(self.stream, self.ledger, self.limits, self._sample_round)
        groups = self._share(self.filled.plan)
        share = self.limits.batch_size // self.limits.num_ranks
        groups += [silenced(group) for group in self._fillers[: share - len(groups)]]
        batch: dict[str, Any] = join_groups(groups, self._tokenizer.pad_token_id)
        batch["num_items_in_batch"] = self.accelerator.gather(num_counted(batch)).sum()
        return batch

    def _sample_round(self, prompts: list[int], first_serial: int) -> Round:
        """Answer this rank's part of the prompts, reward the answers, and keep the groups that teach something."""
        rank, share = self.accelerator.process_index, len(prompts) // self.limits.num_ranks
        rows = [dict(self.train_dataset[prompt]) for prompt in prompts[rank * share : (rank + 1) * share]]
        size = self.num_generations
        batch = super()._generate_and_score_completions([dict(row) for row in rows for _ in range(size)])
        if self.limits.is_dynamic and "old_per_token_logps" not in batch:
            batch["old_per_token_logps"] = self._logps_of(batch)  # a carried-over group meets another policy
        judged, totals = self._judged()
        local = judged[rank * share * size : (rank + 1) * share * size]
        kept = []
        for number, group in enumerate(split_groups(batch, size)):
            answers = range(number * size, (number + 1) * size)
            is_whole = not self._failed.intersection(answers)
            is_kept = is_whole and is_informative([local[i] for i in answers], self.args.reward_std_tolerance)
            kept.append(is_kept)
            if is_kept or not self.limits.is_dynamic:
                self._groups[first_serial + rank * share + number] = group
            elif len(self._fillers) < self.limits.batch_size // self.limits.num_ranks:
                self._fillers.append(group)
        self.round_ends(first_serial, batch, totals)
        known = [total for total in totals if total == total]
        mean_reward = sum(known) / len(known) if known else math.nan
        return Round([list(flags) for flags in gather_object([kept])], mean_reward)

    def round_ends(self, first_serial: int, batch: Mapping[str, Tensor], totals: list[float]) -> None:
        """Called once a round's answers are rewarded; a place for records.

        Args:
            batch: of this rank. totals: rewards of the answers of all ranks, in rank order.
        """

    def _judged(self) -> tuple[list[float], list[float]]:
        """Of every answer of the round, all ranks: what has to differ in its group, and the weighed sum."""
        assert self._round_rewards is not None
        names = self.rewards.names
        rows = [
            {name: None if value != value else value for name, value in zip(names, row, strict=True)}
            for row in self._round_rewards.tolist()
        ]
        totals = [math.nan if all(v is None for v in row.values()) else self.rewards.total(row) for row in rows]
        by = self.args.dynamic_sampling_by
        if by == "total":
            return totals, totals
        of_one = [row[by] for row in rows]
        return [math.nan if value is None else value for value in of_one], totals

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        self._failed, self.round_failures = set(), []
        self._round_rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._round_rewards

    def _logps_of(self, batch: Mapping[str, Tensor], model: Any = None) -> Tensor:
        """(answers, tokens) log-probs of the answers under `model`, by default the policy as it is, in nats."""
        with torch.no_grad():
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model if model is None else model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
            )
        return logps

    def _share(self, plan: Plan) -> list[Group]:
        """This rank's groups of the batch, after those that have to travel have done so."""
        rank = self.accelerator.process_index
        if plan.moves:
            leaving = {
                move.serial: {name: tensor.cpu() for name, tensor in self._groups.pop(move.serial).items()}
                for move in plan.moves
                if move.source == rank
            }
            everywhere = {serial: group for part in gather_object([leaving]) for serial, group in part.items()}
            for move in plan.moves:
                if move.target == rank:
                    group = everywhere[move.serial]
                    self._groups[move.serial] = {n: t.to(self.accelerator.device) for n, t in group.items()}
        return [self._groups.pop(serial) for serial in plan.groups[rank]]

    def reward_answers(self, name: str, columns: Mapping[str, Any]) -> list[float | None]:
        """What TRL asks a reward: one number for each answer of this rank."""
        prompts, ids = columns["prompts"], columns["completion_ids"]
        names = [key for key in columns if key not in (*_OF_TRL, "prompts", "completions", "completion_ids")]
        answers = [
            Answered(
                fields_of({key: columns[key][i] for key in names}),
                prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}],
                self._tokenizer.decode(ids[i], skip_special_tokens=True),
                ids[i],
            )
            for i, prompt in enumerate(prompts)
        ]
        size = self.num_generations if self.model.training else self.num_generations_eval
        scores = self.rewards.score(name, answers, size)
        if self.rewards.on_failure == "drop_group":
            self._failed |= {failure.index for failure in scores.failures}
        self.round_answers = answers
        self.round_failures += scores.failures
        return scores.values


class _Reward:
    """A reward as TRL calls it; `__name__` is what it is called in the logs."""

    def __init__(self, trainer: SamplingTrainer, name: str) -> None:
        self.trainer, self.__name__ = trainer, name

    def __call__(self, **columns: Any) -> list[float | None]:
        return self.trainer.reward_answers(self.__name__, columns)


def require_known_trl(version: str = trl.__version__) -> None:
    """Raise RequestError unless TRL is of the version whose methods are overridden here."""
    if version.split(".")[:2] != _MADE_FOR.split("."):
        raise RequestError(
            f"psft grpo is made for TRL {_MADE_FOR} and overrides how it samples; this is TRL {version}. Install it: "
            f'pip install "trl=={_MADE_FOR}.*".'
        )


def _by_name(functions: Any) -> dict[str, Callable[..., Any]]:
    """Callables by their names."""
    if functions is None:
        return {}
    named = {}
    for function in functions if isinstance(functions, list) else [functions]:
        if not callable(function) or isinstance(function, torch.nn.Module):
            raise RequestError(
                f"reward_funcs holds a {type(function).__name__}; psft takes functions. Wrap a reward model in one: "
                "def my_reward(prompts, completions, **columns) -> list[float]."
            )
        name = getattr(function, "__name__", type(function).__name__)
        if name in named:
            raise RequestError(f"reward_funcs has two functions called {name}. Give each a __name__ of its own.")
        named[name] = function
    return named
