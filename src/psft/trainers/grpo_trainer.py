"""`GRPOStageTrainer`: GRPO with all of DAPO as the stage after fine-tuning, in psft's run folder, resumable to the bit.

A checkpoint holds, beside the Trainer's files, the place in the data, the carried-over groups and the rest of the open
batch with its old log-probs: what was sampled is never sampled again, and a run that goes on comes to the same numbers
where generation does (transformers' `generate` from a restored random state; not vLLM).
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.trainer.utils import add_fused_lm_head

from psft.errors import RequestError
from psft.ops import IGNORE_INDEX
from psft.trainers.compute import use_machine
from psft.trainers.grpo_config import GRPOStageConfig
from psft.trainers.grpo_sampling import SamplingTrainer
from psft.trainers.head import ScoredTokens
from psft.trainers.rollout_groups import Group, num_counted
from psft.trainers.safeguards import refuse_coarse_weights, switch_dropout_off
from psft.trainers.stage import StageTrainer

_PER_STEP = {
    "entropy": "entropy",
    "clip_fraction": "clip_ratio/region_mean",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
}
_PER_BATCH = {
    "reward_mean": "reward",
    "reward_std": "reward_std",
    "completion_length_mean": "completions/mean_length",
    "completion_length_min": "completions/min_length",
    "completion_length_max": "completions/max_length",
    "truncated_share": "completions/clipped_ratio",
    "kl_start_k3": "kl_start_k3",
}
"""Field of metrics.jsonl -> what TRL logs. Of all that was sampled for a batch, dropped groups included."""
_FAILURES, _ANSWERS = "reward_failures.jsonl", "answers.jsonl"


class GRPOStageTrainer(StageTrainer, SamplingTrainer):
    """GRPO after fine-tuning: `trl.GRPOTrainer`'s loss and generation, psft's rewards, sampling, records and resume.

        training_step   TRL's, and counts for the row of the step
        round_ends      answers and failed rewards into the run folder; how far the policy is from where it began
        _save_state     open batch and carried-over groups, a file for each rank

    Args: as `SamplingTrainer`.
    Raises:
        RequestError: what cannot be combined, by name, before anything is trained.
    """

    stage = "grpo"
    memory_advice = "Lower per_device_train_batch_size, num_generations or max_completion_length."
    held_out_metrics = ("reward",)
    _tag_names = ["trl", "grpo", "psft"]

    args: GRPOStageConfig
    model: Any

    def __init__(self, model: Any, args: GRPOStageConfig, train_dataset: Any, **others: Any) -> None:
        use_machine(args)
        start = copy.deepcopy(model) if args.kl_to_start and others.get("peft_config") is None else None
        super().__init__(model, args, train_dataset, **others)
        refuse_coarse_weights(self.model, args)
        if args.disable_dropout:
            switch_dropout_off(self.model, "GRPO")
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if args.kl_to_start and is_sharded:
            raise RequestError(
                "kl_to_start keeps a whole copy of the model, which FSDP and DeepSpeed cut up. Set it to false."
            )
        self._start = None if start is None or is_peft_model(self.model) else self._frozen(start)
        self._loss: Tensor | None = None
        self._num_tokens = 0
        self._measured: defaultdict[str, list[float]] = defaultdict(list)  # by TRL since the last row

    def _frozen(self, model: Any) -> Any:
        model.requires_grad_(False)
        add_fused_lm_head(
            model, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
            outputs=("log_probs", "entropy"),
        )  # fmt: skip
        return model.to(self.args.device)

    def method_info(self) -> dict[str, Any]:
        args = self.args
        names = (
            "loss_type", "epsilon", "epsilon_high", "beta", "scale_rewards", "num_iterations", "temperature", "top_p",
            "top_k", "min_p", "repetition_penalty", "num_generations", "max_completion_length",
            "mask_truncated_completions", "dynamic_sampling", "dynamic_sampling_by", "reward_std_tolerance",
            "max_sampling_rounds", "importance_sampling_level", "use_vllm", "vllm_importance_sampling_correction",
        )  # fmt: skip
        return {
            "objective": {
                "name": "grpo",
                "settings": {name: getattr(args, name) for name in names}
                | {"rewards": self.rewards.weights, "reward_settings": args.reward_settings},
            },
            "attention": self.model.config._attn_implementation,
        }

    def batch_settings(self) -> dict[str, Any]:
        names = ("train_batch_size", "mini_batch_size", "sampling_batch_size", "per_device_train_batch_size")
        return {name: getattr(self.args, name) for name in names}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._loss is None:
            self.recorder.step_begins()
            self._loss = torch.zeros((), device=self.args.device)
        # What TRL measures goes into our row, and from there to trackers: under one name each, once
        kept, self._metrics["train"] = self._metrics["train"], self._measured
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._metrics["train"] = kept
        self._loss += loss
        self.recorder.loss = self._loss
        return loss

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if self.model.training:
            self._num_tokens += int(num_counted(inputs))
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def round_ends(self, first_serial: int, batch: Mapping[str, Tensor], totals: list[float]) -> None:
        if self.args.kl_to_start:
            self._measured["kl_start_k3"].append(self._kl_to_start(batch))
        failures = gather_object(self.round_failures)
        step = self.state.global_step + 1
        if self.is_world_process_zero():
            for failure in failures:
                row = {"step": step, "reward": failure.reward, "reason": failure.reason}
                self.recorder.folder.append(_FAILURES, {**row, "prompt": failure.prompt, "response": failure.response})
            if not self._measured["reward_failures"]:  # the first round of a batch
                self.recorder.folder.append(_ANSWERS, {"step": step, **self._shown(totals)})
        self._measured["reward_failures"].append(float(len(failures)))

    def _shown(self, totals: list[float]) -> dict[str, Any]:
        """The first group of the round, at most 4 answers, for a person to read."""
        shown = self.round_answers[: min(self.num_generations, 4)]
        assert self._round_rewards is not None
        parts = self._round_rewards[: len(shown)].tolist()
        return {
            "prompt": shown[0].question,
            "answers": [
                {
                    "response": answer.response,
                    "tokens": len(answer.tokens),
                    "reward": total,
                    "rewards": dict(zip(self.rewards.names, part, strict=True)),
                }
                for answer, total, part in zip(shown, totals, parts, strict=False)
            ],
        }

    def _kl_to_start(self, batch: Mapping[str, Tensor]) -> float:
        """KL(policy || the model as it began) per token, in nats, over the answers the policy just drew: k3."""
        now = batch["old_per_token_logps"] if "old_per_token_logps" in batch else self._logps_of(batch)
        if self._start is not None:
            start = self._logps_of(batch, self._start)
        else:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                start = self._logps_of(batch)
        mask = batch["completion_mask"].bool()
        log_ratio = torch.where(mask, start - now, 0.0)
        k3 = log_ratio.exp() - log_ratio - 1
        sums = self._reduce(torch.stack([(k3 * mask).sum(), mask.sum().float()]), "sum")
        return (sums[0] / sums[1].clamp(min=1)).item()

    def step_row(self, grad_norm: Any, learning_rate: float | None) -> dict[str, Any] | None:
        if self._loss is None:
            return None
        args, filled = self.args, self.filled
        loss = self._reduce(self._loss, "sum").item() / args.world_size
        tokens = int(self._reduce(torch.tensor(self._num_tokens, device=args.device), "sum"))
        self._loss, self._num_tokens = None, 0
        assert args.steps_per_generation is not None
        passes = args.steps_per_generation * self.num_iterations
        steps = passes // args.gradient_accumulation_steps
        done = self._step // args.gradient_accumulation_steps - 1
        row: dict[str, Any] = {
            "step": self.state.global_step,
            "stage": "train",
            "window": done // steps,
            "mini_batch": done % steps + 1,
            "num_mini_batches": steps,
            "epoch": self.stream.epoch,
            "tokens": tokens,
            "loss": loss,
            **{name: self._mean(of_trl) for name, of_trl in _PER_STEP.items()},
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "learning_rate": learning_rate,
        }
        if done % steps == 0 and filled is not None:
            row |= {name: self._mean(of_trl) for name, of_trl in _PER_BATCH.items()}
            row |= {f"reward_{name}": self._mean(f"rewards/{name}/mean") for name in self.rewards.names}
            row |= {
                "kept_group_share": filled.num_kept / max(filled.num_sampled, 1) if filled.num_sampled else None,
                "sampling_rounds": filled.num_rounds,
                "groups_sampled": filled.num_sampled,
                "groups_trained": filled.num_groups,
                "groups_carried_over": filled.num_carried_out,
                "reward_failures": int(sum(self._measured["reward_failures"])),
            }
            row = {name: value for name, value in row.items() if value is not None or name == "loss"}
        if self._measured["num_tokens"]:
            self._metrics["train"]["num_tokens"] = self._measured["num_tokens"]
        self._measured.clear()
        return {**row, **self.recorder.pace(tokens)}

    def _mean(self, name: str) -> float | None:
        """Of what TRL measured since the last row; None if nothing."""
        values = [value for value in self._measured[name] if value == value]
        return sum(values) / len(values) if values else None

    def stage_state(self) -> dict[str, Any]:
        return {
            "num_passes": self._step,
            "stream": self.stream.state_dict(),
            "ledger": self.ledger.state_dict(),
            "reward_failures": dict(self.rewards.counts),
        }

    def _save_state(self, folder: Path) -> None:
        super()._save_state(folder)
        tensors = {
            f"group.{serial}.{name}": tensor for serial, group in self._groups.items() for name, tensor in group.items()
        }
        if self._is_batch_open and self._buffered_inputs is not None:
            for number, part in enumerate(self._buffered_inputs):
                tensors |= {f"batch.{number}.{name}": tensor for name, tensor in part.items()}
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(kept, folder / _rollouts_file(self.args.process_index), metadata={"names": json.dumps(sorted(kept))})

    @property
    def _is_batch_open(self) -> bool:
        """Whether steps of the present batch are left."""
        assert self.args.steps_per_generation is not None
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def take_up(self, path: Path, state: dict[str, Any]) -> None:
        if any(state["identity"][name] != self.identity[name] for name in ("data", "batch_sizes", "world_size")):
            return  # allowed, and said: sampling begins anew
        self.stream.load_state_dict(state["stream"])
        self.ledger.load_state_dict(state["ledger"])
        self.rewards.counts.update(state["reward_failures"])
        self._step = int(state["num_passes"])
        parts: dict[int, Group] = {}
        self._groups = {}
        device = self.args.device
        with safe_open(path / _rollouts_file(self.args.process_index), framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                kind, number, name = key.split(".", 2)
                home: dict[int, Group] = self._groups if kind == "group" else parts
                home.setdefault(int(number), {})[name] = file.get_tensor(key).to(device)
        self._buffered_inputs: Any = [parts[number] for number in sorted(parts)] or None

    def _rows_of_step(self) -> list[int]:
        return []  # answers of a batch are shuffled: no prompt is one step's alone

    def _score(self, model: nn.Module, micro_batch: dict[str, Any], **how: Any) -> ScoredTokens:
        """Log-probs and entropies of labelled tokens: what the retention probe asks of a trainer."""
        inputs = self._prepare_plain(micro_batch)
        with self.compute_loss_context_manager():
            output = model(**inputs, fused_lm_head=True)
        mask = inputs["labels"][:, 1:] != IGNORE_INDEX
        return ScoredTokens(logps=output.log_probs, mask=mask, entropies=output.entropy)

    def _prepare_plain(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.args.device) for name, tensor in inputs.items()}

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        return len(self.train_dataset)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # an item of the loader counts passes and holds no tokens


def _rollouts_file(rank: int) -> str:
    return f"psft_rollouts-rank{rank}.safetensors"
