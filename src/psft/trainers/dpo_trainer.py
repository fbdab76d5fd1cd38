"""`DPOStageTrainer`: `trl.DPOTrainer` with psft's run folder, exact steps and a reference scored once."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.trainer_utils import EvalLoopOutput

from psft.data.microbatch import (
    ACCELERATOR_OVERHEAD_TOKENS,
    CPU_OVERHEAD_TOKENS,
    ROW_NUMBERS,
    Cut,
    NumberedRows,
    deal_and_cut,
)
from psft.data.preferences import pair_lengths
from psft.errors import RequestError
from psft.ops import IGNORE_INDEX
from psft.trainers.compute import use_machine
from psft.trainers.cpu_sharding import sharding_on_cpu
from psft.trainers.dpo_config import DPOStageConfig
from psft.trainers.evaluation import evaluation_model
from psft.trainers.head import ScoredTokens
from psft.trainers.loader import WindowLoader, WindowSampler, window_loader
from psft.trainers.pair_batches import PairCollator, StepSums, ungathered
from psft.trainers.safeguards import refuse_coarse_weights, switch_dropout_off
from psft.trainers.stage import StageTrainer
from psft.window import Schedule

CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 8192
"""`max_tokens_per_micro_batch=auto`: on a CPU larger ones only add padding (measured for `psft train`); on an
accelerator one pair at the paper's cut-off, a cautious rule that nothing has measured."""
_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_REFERENCE_FILE, _TRAIN = "psft_reference.safetensors", "train"


class DPOStageTrainer(StageTrainer, trl.DPOTrainer):
    """DPO as the stage after fine-tuning: same constructor as `trl.DPOTrainer`, whose loss and metrics it uses.

    One "batch" of the underlying loop is this rank's share of an optimizer step, already cut into micro-batches. The
    loss is the mean over all pairs of the step, all ranks: how the step is cut changes nothing.

        begins             the reference scores every pair once, or a checkpoint brings what it said
        get_batch_samples  the next step's micro-batches and its number of pairs
        training_step      TRL's loss on each, backward with the share of its pairs

    Args: as `trl.DPOTrainer`; `args` is a `DPOStageConfig`. ref_model: default the model as it is now; under PEFT the
        model without its adapter.
    Raises:
        RequestError: what cannot be combined, by name, before anything is trained.
    """

    stage = "dpo"
    memory_advice = "Lower max_tokens_per_micro_batch, or max_length if it is one pair that does not fit."
    held_out_metrics = ("loss", "rewards_margin", "rewards_accuracy")
    _tag_names = ["trl", "dpo", "psft"]

    args: DPOStageConfig
    model: Any
    train_dataset: Any

    def __init__(
        self, model: Any, ref_model: Any = None, args: DPOStageConfig | None = None, *positional: Any, **kwargs: Any
    ) -> None:
        args = DPOStageConfig() if args is None else args
        _refuse_request(args, positional[1] if len(positional) > 1 else kwargs.get("train_dataset"))
        use_machine(args)
        is_adapted = kwargs.get("peft_config") is not None or is_peft_model(model)
        if ref_model is None and not is_adapted and not args.precompute_ref_log_probs and not isinstance(model, str):
            ref_model = copy.deepcopy(model)  # the very weights; TRL would load those that the model's folder has now
        super().__init__(model, ref_model, args, *positional, **kwargs)
        refuse_coarse_weights(self.model, args)
        if args.disable_dropout:
            switch_dropout_off(self.model, "DPO")
        self._references: dict[str, Tensor] = {}  # by data set: (2, pairs) float32, CPU: chosen, rejected, in nats
        self._micro_batches: list[dict[str, Any]] = []
        self._sums: StepSums | None = None
        self._lengths: tuple[Any, list[int]] | None = None

    def method_info(self) -> dict[str, Any]:
        return {
            "objective": {"name": "dpo", "settings": self.args.loss_settings},
            "reference": {
                "model": "without its adapter" if is_peft_model(self.model) else "as it was before the first step",
                "is_precomputed": self.args.precompute_ref_log_probs,
            },
            "attention": self.model.config._attn_implementation,
        }

    def batch_settings(self) -> dict[str, Any]:
        names = ("train_batch_size", "max_tokens_per_micro_batch", "dataloader_drop_last", "train_sampling_strategy")
        return {name: getattr(self.args, name) for name in names}

    @property
    def row_lengths(self) -> list[int]:
        """Padded tokens of each training pair, both sequences."""
        if self._lengths is None or self._lengths[0] is not self.train_dataset:
            self._lengths = (self.train_dataset, pair_lengths(self.train_dataset))
        return self._lengths[1]

    def schedule(self) -> Schedule:
        """Every optimizer step of this run."""
        size = self.args.train_batch_size
        assert size is not None
        return Schedule(len(self.train_dataset), size, size, drop_last=self.args.dataloader_drop_last)

    def check_batches(self) -> None:
        """Raise `RequestError` for batch sizes that these pairs cannot be trained with."""
        self.schedule()
        cut, longest = self.cut(), max(self.row_lengths)
        if cut.is_hard and longest > cut.max_tokens:
            raise RequestError(
                f"max_tokens_per_micro_batch={cut.max_tokens} is a hard cap, but a pair takes {longest} tokens (both "
                f"answers, padded). Raise it to at least {longest}, or lower max_length."
            )

    def cut(self) -> Cut:
        """How a step is cut into micro-batches."""
        given: Any = self.args.max_tokens_per_micro_batch
        is_cpu, is_auto = self.args.device.type == "cpu", given == "auto"
        tokens = (CPU_TOKENS if is_cpu else ACCELERATOR_TOKENS) if is_auto else int(given)
        overhead = CPU_OVERHEAD_TOKENS if is_cpu else ACCELERATOR_OVERHEAD_TOKENS
        return Cut(tokens, is_hard=not is_auto, overhead_tokens=overhead)

    def create_accelerator_and_postprocess(self) -> None:
        with sharding_on_cpu():
            super().create_accelerator_and_postprocess()

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Pairs that `prepare_preferences` made are ready; others TRL tokenises, and cuts in its collator."""
        is_ready = "prompt_ids" in (getattr(dataset, "column_names", None) or [])
        return dataset if is_ready else super()._prepare_dataset(dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Not in the constructor, where nobody knows yet whether a checkpoint holds them: see `begins`."""
        return dataset

    def begins(self, path: Path | None) -> None:
        self.check_batches()
        if not self.precompute_ref_logps:
            return
        for name, pairs in {_TRAIN: self.train_dataset, **self._held_out()}.items():
            if name not in self._references:
                self._references[name] = self._score_reference(pairs)

    def _held_out(self) -> dict[str, Any]:
        """Held-out data sets by the prefix under which the Trainer evaluates them."""
        data = self.eval_dataset
        if isinstance(data, dict):
            return {f"eval_{name}": pairs for name, pairs in data.items()}
        return {} if data is None else {"eval": data}

    def _micro_batches_of(self, pairs: Any, description: str) -> Iterator[dict[str, Any]]:
        """All pairs of a data set once, in micro-batches of like length, shared out among the ranks."""
        args = self.args
        layout = deal_and_cut(
            range(len(pairs)), pair_lengths(pairs), self.cut(), rank=args.process_index, world_size=args.world_size
        )
        rows, collate = NumberedRows(pairs), PairCollator(self.data_collator)
        is_quiet = bool(args.disable_tqdm) or not self.is_world_process_zero()
        for group in tqdm(layout, desc=description, delay=2, leave=False, disable=is_quiet):
            yield collate(rows.__getitems__([group]))["micro_batches"][0]

    def _score_reference(self, pairs: Any) -> Tensor:
        """(2, pairs) log-probs of chosen and rejected answers under the model as it is now, in nats.

        TRL's `compute_ref_log_probs`; under PEFT without the adapter.
        """
        model: Any = self.ref_model or self.model
        # Every rank adds its own rows to zeros, and the sum over ranks is the whole
        logps = torch.zeros(2, len(pairs), dtype=torch.float32, device=self.args.device)
        was_training = model.training
        model.train()  # as in training; dropout is off
        for micro_batch in self._micro_batches_of(pairs, "reference"):
            numbers = micro_batch[ROW_NUMBERS]
            found = self.compute_ref_log_probs(model, self._prepare_inputs(_model_inputs(micro_batch)))
            for side, values in enumerate(found):
                logps[side, numbers] = values[: len(numbers)].float()
        model.train(was_training)
        return self._reduce(logps, "sum").cpu()

    def _save_state(self, folder: Path) -> None:
        super()._save_state(folder)
        if self._references and self.is_world_process_zero():
            save_file(self._references, folder / _REFERENCE_FILE)

    def take_up(self, path: Path, state: dict[str, Any]) -> None:
        file = path / _REFERENCE_FILE
        if self.precompute_ref_logps and file.exists():
            found = load_file(file)
            if "data" in (self.args.allow_changed or []):  # other pairs, maybe
                del found[_TRAIN]
            self._references = found

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rank's pairs, one optimizer step an item, cut into micro-batches and collated."""
        args = self.args
        sampler = WindowSampler(
            self.schedule(),
            lengths=self.row_lengths,
            cut=self.cut(),
            seed=args.data_seed if args.data_seed is not None else args.seed,
            is_shuffled=args.train_sampling_strategy == "random",
            rank=args.process_index,
            world_size=args.world_size,
        )
        return window_loader(NumberedRows(self.train_dataset), sampler, PairCollator(self.data_collator), args)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The next step's micro-batches, equally many on every rank, and its pairs over all ranks."""
        self.recorder.step_begins()
        batch = next(epoch_iterator, None)
        if batch is None:
            return [], None
        micro_batches = batch["micro_batches"]
        own = torch.tensor(sum(len(each[ROW_NUMBERS]) for each in micro_batches), device=device)
        if self.args.world_size > 1:  # sharded models wait for each other in every forward pass
            most = int(self._reduce(torch.tensor([len(micro_batches)], device=device), "max"))
            borrowed = {**micro_batches[-1], ROW_NUMBERS: []}
            micro_batches = [*micro_batches, *([borrowed] * (most - len(micro_batches)))]
        self._micro_batches = micro_batches
        return [{"micro_batches": micro_batches}], self._reduce(own, "sum")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over the micro-batches of one step. Returns the mean loss of its pairs."""
        model.train()
        sums = StepSums()
        total = torch.zeros((), device=self.args.device)
        micro_batches = inputs["micro_batches"]
        for i, micro_batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            sync = contextlib.nullcontext() if is_last else self.accelerator.no_sync(model)
            share = len(micro_batch[ROW_NUMBERS]) / num_items_in_batch
            with sync, self.maybe_activation_offload_context:
                loss, measured = self._loss_of(model, micro_batch, self._references.get(_TRAIN))
                # DDP and FSDP average gradients over ranks; the sum is meant
                measured["loss"] = loss.item()
                loss = loss * share * self.args.world_size
                self.accelerator.gradient_state._set_sync_gradients(is_last)  # DeepSpeed steps inside a backward
                self.accelerator.backward(loss)
            total += loss.detach()
            sums.add(micro_batch, measured)
        self._sums, self.recorder.loss = sums, total
        return total

    def _loss_of(
        self, model: nn.Module, micro_batch: dict[str, Any], reference: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        """TRL's loss of one micro-batch, the mean over its pairs, and the metrics TRL takes of it.

        Args:
            reference: (2, pairs of the data set) log-probs; None where the reference runs beside the policy.
        """
        inputs = _model_inputs(micro_batch)
        if reference is not None:
            numbers, num_pairs = micro_batch[ROW_NUMBERS], len(inputs["input_ids"]) // 2
            for name, known in zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=True):
                inputs[name] = known[numbers] if numbers else torch.zeros(num_pairs)
        mode = "train" if self.model.training else "eval"
        kept, self._metrics[mode] = self._metrics[mode], defaultdict(list)
        num_tokens = self._total_train_tokens
        try:
            with ungathered(self.accelerator), self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
            measured = {name: values[-1] for name, values in self._metrics[mode].items()}
        finally:
            self._metrics[mode], self._total_train_tokens = kept, num_tokens
        return loss, measured

    def step_row(self, grad_norm: Any, learning_rate: float | None) -> dict[str, Any] | None:
        if self._sums is None:
            return None
        measured = self._sums.read(self._reduce, self.args.device)
        self._sums = None
        self._total_train_tokens += measured.pop("input_tokens")
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return {
            "step": self.state.global_step,
            "stage": "train",
            "epoch": self.state.epoch,
            **measured,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "learning_rate": learning_rate,
            **self.recorder.pace(measured["tokens"]),
        }

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The pairs themselves: `evaluation_loop` cuts them into micro-batches."""
        data: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            return DataLoader(data[eval_dataset])
        return DataLoader(data if eval_dataset is None else eval_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss, margin and accuracy over all pairs of a held-out data set, into eval.jsonl."""
        pairs: Any = dataloader.dataset
        reference = self._references.get(metric_key_prefix)
        if self.precompute_ref_logps and reference is None:
            raise RequestError(
                "these pairs were not scored by the reference before the first step. Give them to the trainer as "
                "eval_dataset, or set precompute_ref_log_probs=false."
            )
        model = evaluation_model(self)  # type: ignore[arg-type]  # asks of a trainer what every one has
        was_training = model.training
        model.eval()
        sums = StepSums()
        with torch.no_grad():
            for micro_batch in self._micro_batches_of(pairs, description):
                loss, measured = self._loss_of(model, micro_batch, reference)
                sums.add(micro_batch, {**measured, "loss": loss.item()})
        model.train(was_training)
        found = sums.read(self._reduce, self.args.device)
        name = metric_key_prefix.removeprefix("eval_") if metric_key_prefix != "eval" else "eval"
        number, accuracy = found["pairs"], found["rewards_accuracy"]
        for metric in self.held_out_metrics:
            is_share = metric == "rewards_accuracy"
            stderr = math.sqrt(accuracy * (1 - accuracy) / number) if is_share else None
            self.recorder.measured(name, metric, found[metric], stderr, number)
        self.recorder.last_evaluated_step = self.state.global_step
        metrics = {f"{metric_key_prefix}_{metric}": found[metric] for metric in self.held_out_metrics}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=number)

    def _rows_of_step(self) -> list[int]:
        return [row for micro_batch in self._micro_batches for row in micro_batch[ROW_NUMBERS]]

    def _score(self, model: nn.Module, micro_batch: dict[str, Any], **how: Any) -> ScoredTokens:
        """Log-probs and entropies of labelled tokens: what the retention probe asks of a trainer."""
        inputs = self._prepare_inputs(micro_batch)
        with self.compute_loss_context_manager():
            output = model(**inputs, fused_lm_head=True)
        mask = inputs["labels"][:, 1:] != IGNORE_INDEX
        return ScoredTokens(logps=output.log_probs, mask=mask, entropies=output.entropy, is_top1=output.is_top1)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        if isinstance(dataloader, WindowLoader):
            return dataloader.window_sampler.schedule.num_rows
        return super().num_examples(dataloader)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        num_tokens = sum(int(each["attention_mask"].sum()) for each in inputs.get("micro_batches", []))
        return 6 * num_tokens * self.model.num_parameters(exclude_embeddings=True)


def _model_inputs(micro_batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in micro_batch.items() if name != ROW_NUMBERS}


def _refuse_request(args: Any, train_dataset: Any) -> None:
    if not isinstance(args, DPOStageConfig):
        raise RequestError(
            f"args is a {type(args).__name__}; DPOStageTrainer needs a psft.DPOStageConfig (same fields and more)."
        )
    if train_dataset is not None and not hasattr(train_dataset, "__len__"):
        raise RequestError("a streaming train_dataset has no known length. Load it without streaming=True.")
    if train_dataset is not None and not len(train_dataset):
        raise RequestError("the training set has no rows. Give at least one pair.")
    launched = any(os.environ.get(name, "").lower() == "true" for name in _SHARDED)  # as accelerate tells its processes
    is_sharded = launched or bool(args.deepspeed) or bool(args.fsdp)
    if is_sharded and args.precompute_ref_log_probs:
        raise RequestError(
            "precompute_ref_log_probs scores the pairs before the model is cut up between ranks, where it may not fit. "
            "Set it to false: a frozen copy, cut up likewise, is then run beside the policy."
        )
