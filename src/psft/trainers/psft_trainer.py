"""`PSFTTrainer`: `trl.SFTTrainer` with the window of the old policy inside its training loop."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from psft.data.microbatch import (
    ROW_NUMBERS,
    MiniBatchCollator,
    NumberedRows,
    empty_micro_batch,
)
from psft.errors import RequestError
from psft.objectives import Objective, resolve_objective, sft_loss
from psft.ops import IGNORE_INDEX
from psft.trainers.bound_objective import BoundObjective
from psft.trainers.clipped_tokens import ClippedTokens
from psft.trainers.cpu_sharding import sharding_on_cpu
from psft.trainers.durable import DurableTrainer
from psft.trainers.evaluation import token_mean_evaluation
from psft.trainers.head import ADAPTER_ON_HEAD, ScoredTokens, add_token_scoring
from psft.trainers.kept_apart import check_rows_kept_apart
from psft.trainers.layout import (
    TrainedTokens,
    aggregation_normalizer,
    borders_of_one_row,
    hides_right_padding_only,
    sequence_ids,
)
from psft.trainers.loader import Layout, WindowLoader, WindowSampler, window_loader
from psft.trainers.micro_batch_cap import MicroBatchCap
from psft.trainers.psft_config import PSFTConfig
from psft.trainers.recording import RunRecorder
from psft.trainers.reference import FrozenReference
from psft.trainers.safeguards import (
    announce_plain_sft,
    check_passes_agree,
    refuse_model,
    refuse_request,
    switch_dropout_off,
)
from psft.trainers.telemetry import StepTelemetry
from psft.trainers.trackers import keep_for_trackers
from psft.trainers.transfer import to_device
from psft.trainers.trl_kernel import choose_head_kernel
from psft.trainers.trust_region import TrustRegion
from psft.trainers.watching import RunWatch
from psft.window import Schedule, Step, Window


class PSFTTrainer(DurableTrainer):
    """Proximal SFT as a drop-in for `trl.SFTTrainer`: same constructor, data sets, callbacks, PEFT, trackers, hub.

    One "batch" of the underlying loop is this rank's share of a mini-batch, already cut into micro-batches:

        get_batch_samples   at a window's start: draw its mini-batches, score all but the first (old pass, no grad)
        training_step       forward, objective and backward over the mini-batch's micro-batches
        then                gradient clipping, one optimizer step, a row of metrics.jsonl

    Source of the method: Zhu et al., arXiv:2508.17784.

    Args: as `trl.SFTTrainer`; `args` is a `PSFTConfig`. ref_model: the frozen reference of an objective that needs one;
        default: the model as it is now (under PEFT the model without its adapter).
    Raises:
        RequestError: what cannot be combined with a window of one old policy, by name, before anything is trained.
    """

    held_out_metrics = ("nll", "entropy")
    _tag_names = ["trl", "sft", "psft"]
    _name = "PSFT"
    _paper = {
        "title": "Proximal Supervised Fine-Tuning",
        "id": "2508.17784",
        "citation": "@article{zhu2025proximal,\n  title={Proximal Supervised Fine-Tuning},\n"
        "  author={Zhu and others},\n"
        "  journal={arXiv preprint arXiv:2508.17784},\n  year={2025}\n}",
    }
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # every objective divides by the tokens of the whole step

    args: PSFTConfig
    model: Any
    train_dataset: Any
    objective: Objective

    def __init__(
        self,
        model: Any,
        args: PSFTConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        *positional: Any,
        ref_model: Any = None,
        **kwargs: Any,
    ) -> None:
        args = PSFTConfig() if args is None else args
        refuse_request(args, train_dataset, kwargs.get("compute_loss_func"))
        self.objective = args.resolved_objective()
        self._warmup_objective = resolve_objective("sft", {})
        try:
            super().__init__(model, args, data_collator, train_dataset, *positional, **kwargs)
        except ValueError as error:
            if "adapter to `lm_head`" in str(error):  # TRL's refusal; `add_token_scoring` has more of that kind
                raise RequestError(ADAPTER_ON_HEAD) from error
            raise
        refuse_model(self.model, args, has_router_loss=self.aux_loss_enabled)
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        head_dtype = policy.get_output_embeddings().weight.dtype
        self.attention = policy.config._attn_implementation
        self.head_kernel = choose_head_kernel(args.head_kernel, self.objective, args.device, head_dtype)
        self.reference = FrozenReference.of(self, ref_model)  # before the head below changes what is copied
        add_token_scoring(policy, self.head_kernel)
        if self.objective.needs_old_logps:
            switch_dropout_off(self.model)
            announce_plain_sft(args)
        self.trust_region = TrustRegion(args, self.objective)
        self.recorder = RunRecorder(self)
        self.benchmarks = None
        if args.eval_suite:
            from psft.trainers.benchmarks import Benchmarks

            self.benchmarks = Benchmarks(self)
        self.watch = RunWatch(self, () if self.benchmarks is None else self.benchmarks.metrics)
        is_tracked = args.track_clipped_tokens and self.trust_region.radius_name is not None
        self.clipped_tokens = ClippedTokens(self) if is_tracked else None
        self.micro_batch_cap = MicroBatchCap(self)
        self._window: Window | None = None
        self._left: tuple[list[Step], list[Layout], dict[Any, Tensor]] | None = None
        self._current_step: Step | None = None
        self._epoch_steps: deque[Step] = deque()
        self._probe_logps: Tensor | None = None
        self._is_pass_checked = False
        self._epoch = self._steps_in_epoch = 0

    def create_accelerator_and_postprocess(self) -> None:
        with sharding_on_cpu():
            super().create_accelerator_and_postprocess()

    def schedule(self) -> Schedule:
        """Every optimizer step of this run."""
        args = self.args
        assert args.train_batch_size is not None and args.mini_batch_size is not None  # PSFTConfig fills them in
        return Schedule(
            len(self.train_dataset),
            args.train_batch_size,
            args.mini_batch_size,
            drop_last=args.dataloader_drop_last,
            warmup_steps=args.sft_warmup_steps,
            warmup_mini_batch_size=args.sft_warmup_mini_batch_size,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rank's rows, one mini-batch an item, cut into micro-batches and collated once for both passes."""
        args = self.args
        sampler = WindowSampler(
            self.schedule(),
            lengths=self.row_lengths,
            cut=self.micro_batch_cap.cut(),
            seed=args.data_seed if args.data_seed is not None else args.seed,
            is_shuffled=args.train_sampling_strategy == "random",
            rank=args.process_index,
            world_size=args.world_size,
        )
        rows = NumberedRows(self._remove_unused_columns(self.train_dataset, description="training"))
        return window_loader(rows, sampler, MiniBatchCollator(self.data_collator), args)

    def set_initial_training_values(self, args: Any, dataloader: DataLoader[Any]) -> tuple[Any, ...]:
        values = list(super().set_initial_training_values(args, dataloader))
        # Exact also where warm-up steps, larger than mini-batches, make the first epochs shorter.
        schedule, ahead = self.schedule(), 0
        if self._resume is not None and not self._resume.keeps_window:  # e.g. other batch sizes: count on
            position = self._resume.position
            ahead = schedule.num_steps(position.epoch) + position.step_in_epoch - self._resume.step
        if args.max_steps < 0:
            values[-1] = schedule.num_steps(args.num_train_epochs) - ahead
        else:
            values[0] = schedule.num_epochs(args.max_steps + ahead)
        return tuple(values)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        if isinstance(dataloader, WindowLoader):
            return dataloader.window_sampler.schedule.num_rows
        return super().num_examples(dataloader)

    def get_total_train_batch_size(self, args: Any) -> int:
        assert self.args.mini_batch_size is not None
        return self.args.mini_batch_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        num_tokens = inputs.get("num_input_tokens")
        if num_tokens is None:
            return super().floating_point_ops(inputs)
        return 6 * num_tokens * self.model.num_parameters(exclude_embeddings=True)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.watch.begins()
        self.watch.makes_up()
        if self.benchmarks is not None:
            self.benchmarks.begins()
        is_over = self.stop_signal.number is not None  # it came while the model was evaluated
        is_over |= self.state.global_step >= self.state.max_steps  # resumed at the end
        is_over |= self._resume is not None and self.control.should_training_stop  # what was made up for meets a rule
        if is_over:
            self.control.should_training_stop = True
            return
        loader, self._epoch = kwargs["train_dataloader"], kwargs["epoch"]
        loader.set_epoch(self._epoch)
        is_resumed = self._resume is not None and self._epoch == kwargs["epochs_trained"]
        self._steps_in_epoch = kwargs["steps_trained_in_current_epoch"] if is_resumed else 0
        self._epoch_steps = deque(loader.window_sampler.steps()[self._steps_in_epoch :])
        self._window = None
        if self._epoch == kwargs["epochs_trained"]:
            if self.padding_free:
                check_rows_kept_apart(self)
            self.micro_batch_cap.settle()
        loader.window_sampler.cut = self.micro_batch_cap.cut()
        self._left = self._rest_of_window() if is_resumed else None
        if self._left is not None:
            steps = range(self._steps_in_epoch, self._steps_in_epoch + len(self._left[0]))
            loader.window_sampler.keep(self._epoch, dict(zip(steps, self._left[1], strict=True)))
        if self.reference is not None:
            self.reference.prepare()
        super()._run_epoch(*args, **kwargs)
        if self.clipped_tokens is not None:
            self.clipped_tokens.write(self.recorder.folder.path)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The next mini-batch and its trained tokens over all ranks; opens the next window when one is spent."""
        self.recorder.step_begins()
        if self._window is None or self._window.is_spent:
            if not self._epoch_steps:
                return [], None
            self._window = self._open_window(epoch_iterator)
        was_warmup = self._current_step is not None and self._current_step.is_warmup
        self._current_step, micro_batches = self._window.take()
        self._steps_in_epoch += 1
        if was_warmup and not self._current_step.is_warmup and self.args.sft_warmup_optimizer_state == "reset":
            assert self.optimizer is not None
            self.optimizer.state.clear()  # the next step builds its moments anew; the schedule goes on
        num_tokens = sum((m["labels"][:, 1:] != -100).sum() for m in micro_batches)
        normalizer = self._reduce(torch.as_tensor(num_tokens, device=device), "sum").clamp(min=1)
        num_input_tokens = self._num_input_tokens.popleft()
        return [{"micro_batches": micro_batches, "num_input_tokens": num_input_tokens}], normalizer

    def _open_window(self, epoch_iterator: Iterator[Any]) -> Window:
        left, self._left = self._left, None
        if left is not None:
            steps, _, old_logps = left
        else:
            first = self._epoch_steps[0]
            steps_left = self.state.max_steps - self.state.global_step
            size = min(self.trust_region.num_mini_batches(first), len(self._epoch_steps))
            steps = list(islice(self._epoch_steps, min(size, max(steps_left, 1))))  # the run may end inside
            steps = self.trust_region.labelled(steps)
        for _ in steps:
            self._epoch_steps.popleft()
        batches = [next(epoch_iterator) for _ in steps]
        self._num_input_tokens = deque(batch["num_input_tokens"] for batch in batches)
        mini_batches = self._in_step([batch["micro_batches"] for batch in batches])
        if left is not None:
            return Window.resumed(steps, mini_batches, old_logps)
        window = Window(steps, mini_batches)
        if self.objective.needs_old_logps and len(steps) > 1:
            self._score_old_policy(window)
        return window

    def _in_step(self, mini_batches: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
        """Give every rank the same number of micro-batches: sharded models wait for each other in every forward."""
        if self.args.world_size == 1:
            return mini_batches
        counts = torch.tensor([len(mini_batch) for mini_batch in mini_batches], device=self.args.device)
        most = self._reduce(counts, "max").tolist()
        return [
            [*mini_batch, *(empty_micro_batch(mini_batch[-1]) for _ in range(number - len(mini_batch)))]
            for mini_batch, number in zip(mini_batches, most, strict=True)
        ]

    def _score_old_policy(self, window: Window) -> None:
        """The old pass: same micro-batches, mode and kernels as the training pass; mini-batch 1 needs none."""
        model = self.model_wrapped
        model.train()
        with torch.no_grad():
            for number, micro_batches in enumerate(window.mini_batches):
                if number == 0 and not self._is_pass_checked:
                    self._probe_logps = self._score(model, micro_batches[0], score_tokens="logps").logps
                if number > 0:
                    for i, micro_batch in enumerate(micro_batches):
                        scored = self._score(model, micro_batch, score_tokens="logps")
                        window.store_old_logps(number, i, scored.logps)

    def _score(self, model: nn.Module, micro_batch: dict[str, Any], **how: Any) -> ScoredTokens:
        """Call the model on a micro-batch as `add_token_scoring` taught it; the default gives every statistic."""
        with self.compute_loss_context_manager():
            return model(**self._model_inputs(micro_batch), **{"score_tokens": "statistics", **how})

    def _model_inputs(self, micro_batch: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with, on its device. All that has to be looked up in the data is, on the host."""
        inputs = {name: value for name, value in micro_batch.items() if name != ROW_NUMBERS}
        inputs["trained_positions"] = TrainedTokens.of(inputs["labels"]).positions
        if hides_right_padding_only(inputs.get("attention_mask")):
            del inputs["attention_mask"]
            if len(inputs["labels"]) == 1 and "position_ids" not in inputs and "flash" in self.attention:
                inputs |= borders_of_one_row(inputs["labels"].shape[1])
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                inputs[name] = to_device(value, self.args.device)
        return self._prepare_inputs(inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward, objective and backward over the micro-batches of one mini-batch. Returns the step's loss."""
        assert self._window is not None and self._current_step is not None
        model.train()
        telemetry = StepTelemetry(self.args.device)
        total = torch.zeros((), device=self.args.device)
        micro_batches = inputs["micro_batches"]
        num_rows = sum(len(micro_batch[ROW_NUMBERS]) for micro_batch in micro_batches)
        for i, micro_batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            sync = contextlib.nullcontext() if is_last else self.accelerator.no_sync(model)
            normalizer = aggregation_normalizer(
                self.args.loss_aggregation,
                micro_batch["labels"][:, 1:] != IGNORE_INDEX,
                num_tokens=num_items_in_batch,
                share=len(micro_batch[ROW_NUMBERS]) / max(num_rows, 1),
                world_size=self.args.world_size,
            )
            objective, old_logps = self._bound_objective(i, micro_batch, normalizer)
            with sync, self.maybe_activation_offload_context:
                scored = self._score(model, micro_batch, score_tokens="objective", objective=objective)
                self._compare_passes(scored)
                # DDP and FSDP average gradients over ranks; the sum is meant
                loss = scored.loss * self.args.world_size
                self.accelerator.gradient_state._set_sync_gradients(is_last)  # DeepSpeed steps inside a backward
                self.accelerator.backward(loss)
            total += loss.detach()
            weight = normalizer / num_items_in_batch  # metrics are token means, however the loss is averaged
            if old_logps is None and objective.objective.needs_old_logps:
                old_logps = scored.logps  # the first mini-batch: its ratio is 1
            clipped = self._clipped(scored, old_logps)
            telemetry.add(scored, old_logps, {name: x * weight for name, x in scored.metrics.items()}, clipped)
            if self.clipped_tokens is not None and clipped is not None and self._current_step.mini_batch > 1:
                self.clipped_tokens.add(micro_batch, scored.mask, clipped, self._epoch + 1)
        self.recorder.loss_seen(telemetry, total)
        return total

    def _clipped(self, scored: ScoredTokens, old_logps: Tensor | None) -> Tensor | None:
        """(B, T - 1) bool: counted tokens whose gradient the bound removed; None where the objective has no bound."""
        if old_logps is None:
            return None
        clipped = self.trust_region.clipped(scored.logps.detach(), old_logps)
        return None if clipped is None else clipped & scored.mask

    def _compare_passes(self, scored: ScoredTokens) -> None:
        """Once a run: what the old pass gave for this micro-batch at equal weights against what this pass gives."""
        if self._probe_logps is not None:
            check_passes_agree(self._probe_logps, scored, self.model, allow_noise=self.args.allow_ratio_noise)
            self._probe_logps, self._is_pass_checked = None, True

    def _bound_objective(
        self, number: int, micro_batch: dict[str, Any], normalizer: Tensor
    ) -> tuple[BoundObjective, Tensor | None]:
        """The objective for micro-batch `number` of the step, and the old log-probs it is held against, if stored."""
        assert self._current_step is not None and self._window is not None
        if self._current_step.is_warmup:
            return BoundObjective(self._warmup_objective, normalizer), None
        objective, device = self.objective, self.args.device
        constants: dict[str, Tensor] = {}
        old_logps = self._window.old_logps(number) if objective.needs_old_logps else None
        if old_logps is not None:
            constants["old_logps"] = old_logps
        if objective.needs_ref_logps:
            assert self.reference is not None
            mask = micro_batch["labels"][:, 1:] != IGNORE_INDEX
            ref_logps = self.reference.target_logps(micro_batch[ROW_NUMBERS], mask)
            constants["ref_logps"] = to_device(ref_logps, device)
        if "sequence_ids" in objective.needs:
            constants["sequence_ids"] = to_device(sequence_ids(micro_batch), device)
        reference = None
        if objective.needs_ref_vocabulary:
            assert self.reference is not None
            reference = self.reference.logits(micro_batch)
        overrides = self.trust_region.overrides
        return BoundObjective(objective, normalizer, constants, reference, overrides), old_logps

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """NLL in nats per token of one padded batch, for predictions with `compute_metrics`; not for training."""
        scored = self._score(model, inputs, score_tokens="logps")
        loss = sft_loss(scored.logps, scored.mask, normalizer=scored.mask.sum().clamp(min=1)).loss
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{k: v for k, v in inputs.items() if k != "labels"})

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The scheduler of transformers, with `sft_warmup_learning_rate` as its peak during the plain-SFT stage."""
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        warmup_rate = self.args.sft_warmup_learning_rate
        if is_new and warmup_rate is not None:
            if not isinstance(scheduler, LambdaLR):
                raise RequestError(
                    f"sft_warmup_learning_rate needs a schedule given as a function of the step; "
                    f"lr_scheduler_type='{self.args.lr_scheduler_type}' is none. Use constant_with_warmup or cosine."
                )
            factor, last = warmup_rate / self.args.learning_rate, self.args.sft_warmup_steps
            inner = scheduler.lr_lambdas
            scheduler.lr_lambdas = [_scaled_before(last, factor, rate) for rate in inner]
            for group, base, rate in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * rate(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        return scheduler

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Where `select_best` chooses the best checkpoint, held-out data do not."""
        return self.args.select_best is None and super()._determine_best_metric(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """NLL and entropy as means over all tokens of the data set; with `compute_metrics`, the Trainer's own loop."""
        if self.compute_metrics is not None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        result = token_mean_evaluation(self, dataloader, description)
        self.recorder.evaluated(metric_key_prefix, result)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.metrics().items()}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=result.num_rows)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.makes_up()  # a run that goes on from its end has no epoch left
        if self.benchmarks is not None and self.stop_signal.number is None:
            self.benchmarks.begins()
        self._tr_loss = self._reduce(self._tr_loss, "sum") / self.args.world_size  # else this rank's own is reported
        return super()._finalize_training(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: Any, trial: Any, epoch: Any, *args: Any, **kwargs: Any
    ) -> None:
        is_step = self.recorder.telemetry is not None and self._current_step is not None
        if is_step:
            assert self._window is not None and self._current_step is not None
            row = self.recorder.step_ends(self._current_step, grad_norm, kwargs.get("learning_rate"), self._reduce)
            keep_for_trackers(self._metrics["train"], row)
            self.trust_region.step_ends(self._current_step, row, is_last=self._window.is_spent)
            if self.clipped_tokens is not None:
                self.clipped_tokens.step_ends()
            self._total_train_tokens += row["tokens"]
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            self.watch.step_ends(row)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)
        if self.benchmarks is not None:
            self.benchmarks.step_ends(is_epoch_end=not is_step)
            if self.control.should_save:  # a rule about a score, or a signal meanwhile
                if self.saved_at != self.state.global_step:
                    self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
                self.benchmarks.step_ends(is_epoch_end=not is_step)

    @property
    def is_at_epoch_end(self) -> bool:
        """Whether the last step of an epoch was the last one done."""
        return self._steps_in_epoch >= len(self.schedule().epoch(self._epoch))


def _scaled_before(last_step: int, factor: float, rate: Callable[[int], float]) -> Callable[[int], float]:
    """The schedule `rate`, times `factor` for the steps before `last_step`."""
    return lambda step: rate(step) * (factor if step < last_step else 1.0)
