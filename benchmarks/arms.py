"""One arm: a trainer driven through its own `train()` on given mini-batches, timed at its step boundaries.

All arms of a workbench share one model object, one optimizer object and one clock. Before a block the model gets back
the weights it began with, and the forward that this arm's trainer gave it: trainers patch it, and would otherwise pile
their patches on top of each other's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from benchmarks.clocks import Clock
from benchmarks.equality import RTOL, Outcome, gradients_of
from benchmarks.harness import Block
from benchmarks.memory import trim_heap
from benchmarks.workload import Row, Tokens
from psft.runs import RunFolder

LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Setting:
    """What all arms of one table share.

    batch_size: rows of an optimizer step. dtype: "float32", or "bfloat16" = autocast over float32 weights.
    rows_at_once: rows of one forward of the trainers that do not cut by tokens; they add up the gradients of as many
        forwards as the step needs. None = all. max_tokens: psft's `max_tokens_per_micro_batch`.
    """

    batch_size: int
    dtype: str = "float32"
    device: str = "cpu"
    gradient_checkpointing: bool = False
    max_tokens: int | str = "auto"
    rows_at_once: int | None = None

    def __post_init__(self) -> None:
        assert self.dtype in ("float32", "bfloat16"), self.dtype
        assert self.batch_size % (self.rows_at_once or self.batch_size) == 0, "a step is whole forwards"

    def accumulation(self) -> dict[str, Any]:
        """Of trainers that do not cut by tokens."""
        rows = self.rows_at_once or self.batch_size
        return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": self.batch_size // rows}

    def trainer_arguments(self, folder: Path) -> dict[str, Any]:
        """Of transformers' `TrainingArguments`, the same for every trainer."""
        return {
            "output_dir": str(folder),
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "num_train_epochs": 1,
            "bf16": self.dtype == "bfloat16",
            "gradient_checkpointing": self.gradient_checkpointing,
            "train_sampling_strategy": "sequential",
            "use_cpu": self.device == "cpu",
            "dataloader_pin_memory": self.device != "cpu",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }


class Workbench:
    """The model, optimizer and rows that arms share."""

    def __init__(self, model: Any, tokenizer: Any, setting: Setting, clock: Clock, folder: Path) -> None:
        self.model, self.tokenizer, self.setting, self.clock, self.folder = model, tokenizer, setting, clock, folder
        gc.collect()
        gc.freeze()  # every `train()` collects garbage first, and would go through all that imports have left
        self.weights: list[torch.Tensor] | None = [p.detach().clone() for p in model.parameters()]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def with_setting(self, setting: Setting) -> Workbench:
        """The same model, weights and optimizer under another setting; arms must be built anew for it."""
        other = object.__new__(Workbench)
        other.__dict__ = {**self.__dict__, "setting": setting}
        return other

    def let_go_of_weights(self) -> None:
        """Drop the copy of the first weights: blocks then begin where the last one ended."""
        self.weights = None

    def release(self) -> None:
        """Give the memory of model and optimizer back, for processes that come after; nothing runs here afterwards."""
        self.model = self.optimizer = self.weights = None  # type: ignore[assignment]
        gc.unfreeze()
        gc.collect()
        trim_heap()

    def restore(self, forward: Any = None) -> None:
        """Give the model its first weights (unless let go), no gradients, and `forward` (None: that of its class)."""
        model = self.model
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            model.__dict__.pop(name, None)
        if forward is not None:
            model.forward = forward
        model.zero_grad(set_to_none=True)
        if self.weights is None:
            return
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), self.weights, strict=True):
                parameter.copy_(value)


class StepMarks(TrainerCallback):
    """Clock marks at the boundaries of one `train()`, which it stops after `limit` steps.

    epoch begins | draw, old pass | step 1 begins | ... | step 1 ends | logging, draw | step 2 begins | ... | epoch ends
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.limit = 0
        self.start: Any = None
        self.end: Any = None
        self.steps: list[list[Any]] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = []
        self.start = self.clock.mark()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([self.clock.mark()])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.steps[-1].append(self.clock.mark())
        if state.global_step >= self.limit:
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end = self.clock.mark()

    def times(self) -> dict[str, Any]:
        """Seconds: the whole, up to the first step's begin (of psft: the old pass), and each step with what follows."""
        seconds = self.clock.seconds
        ends = [step[1] for step in self.steps]
        return {
            "total_s": seconds(self.start, self.end),
            "opening_s": seconds(self.start, self.steps[0][0]),
            "step_s": [seconds(begin, end) for begin, end in self.steps],
            "from_step_to_step_s": [seconds(a, b) for a, b in zip(ends, ends[1:], strict=False)],
        }


class GradientProbe(TrainerCallback):
    """Keeps the gradients of the first step, clipped as the optimizer is about to see them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.gradients: dict[str, torch.Tensor] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gradients is None:
            self.gradients = gradients_of(self.model)


MakeTrainer = Callable[[Workbench, Path, Dataset, int], Any]
"""(bench, output folder, first rows, mini-batches per window) -> an unused trainer."""


@dataclass(frozen=True)
class TrainerArm:
    """name: of the column. family: what it minimises, so whom it must agree with: nll, dft or gem.

    window: mini-batches that share one old policy; 1 for everything without one. steps: optimizer steps of a block.
    reports: where its loss is found: "log" (transformers' log), or a field of psft's metrics.jsonl. rtol: how far its
    float32 loss and gradient may be from the plain ones, relative.
    """

    name: str
    family: str
    make: MakeTrainer
    window: int = 1
    steps: int = 1
    reports: str | None = "log"
    rtol: float = RTOL

    def on(self, bench: Workbench) -> RunningArm:
        return RunningArm(self, bench)


class RunningArm:
    """A `TrainerArm` whose trainer is built, on one workbench."""

    def __init__(self, arm: TrainerArm, bench: Workbench) -> None:
        self.arm, self.bench = arm, bench
        self._trainer: Any = None
        self._forward: Any = None
        self._marks = StepMarks(bench.clock)
        self._folder = bench.folder / f"{arm.name}-{bench.setting.dtype}-{bench.setting.batch_size}"

    def block(self, mini_batches: Sequence[Sequence[Row]]) -> Block:
        """Train on `mini_batches`, as many steps as the arm says, and give the seconds of one mini-batch.

        A window whose mini-batches are all the same rows need not be trained to its end: the old pass covers it whole,
        and each step not taken counts as long as those after the first. `steps_taken` says how many were.
        """
        wanted = min(self.arm.steps, len(mini_batches))
        self._train(mini_batches, wanted)
        times = self._marks.times()
        taken, window = len(times["step_s"]), self.arm.window
        assert taken == wanted, f"{self.arm.name}: {taken} steps instead of {wanted}"
        seconds, counted = times["total_s"], taken
        if taken < window:
            assert taken >= 2 and all(m is mini_batches[0] for m in mini_batches), "cannot tell what is left out"
            later = times["from_step_to_step_s"]
            seconds += (window - taken) * sum(later) / len(later)
            counted = window
        if self.arm.reports not in (None, "log"):
            trained = Tokens.of(mini_batches[0]).trained
            assert self._first_row()["tokens"] == trained, f"{self.arm.name} did not train the rows it was given"
        tokens = Tokens.of([row for mini_batch in mini_batches for row in mini_batch])
        shares = {f"{kind}_tokens": count / len(mini_batches) for kind, count in tokens.to_dict().items()}
        details = {**times, **shares, "steps_taken": taken, "window": window, "loss": self._loss()}
        if self.bench.setting.device == "cuda":
            details["peak_bytes"] = torch.cuda.max_memory_allocated()
        return Block(seconds / counted, details)

    def train(self, mini_batches: Sequence[Sequence[Row]], steps: int) -> None:
        """Train without looking at the time."""
        self._train(mini_batches, steps)

    def warm_up(self, rows: Sequence[Row]) -> None:
        """One untimed step on a few short rows; with a window, one that spills into a second, scored mini-batch."""
        size = self.bench.setting.batch_size + 1 if self.arm.window > 1 else len(rows)
        self._train([[rows[i % len(rows)] for i in range(size)]], 1)

    def outcome(self, rows: Sequence[Row]) -> Outcome:
        """Loss and gradients of the first step on `rows`, one mini-batch; psft scores a second one before it."""
        probe = GradientProbe(self.bench.model)
        trainer = self._built(rows)
        trainer.add_callback(probe)
        try:
            self._train([rows] * min(self.arm.window, 2), 1)
        finally:
            trainer.remove_callback(probe)
        assert probe.gradients is not None
        return Outcome(self._loss(), probe.gradients)

    def close(self) -> None:
        """Let the trainer go, and what it holds (a reference model, an accelerator)."""
        self._trainer = self._forward = None
        self.bench.restore()
        gc.collect()

    def _built(self, rows: Sequence[Row]) -> Any:
        if self._trainer is None:
            self.bench.restore()
            self._trainer = self.arm.make(self.bench, self._folder, Dataset.from_list(list(rows)), self.arm.window)
            self._forward = self.bench.model.__dict__.get("forward")
            self._trainer.add_callback(self._marks)
            self._trainer.remove_callback(PrinterCallback)
        return self._trainer

    def _train(self, mini_batches: Sequence[Sequence[Row]], num_steps: int) -> None:
        rows = [row for mini_batch in mini_batches for row in mini_batch]
        trainer = self._built(rows)
        self.bench.restore(self._forward)
        give_rows(trainer, rows)
        self._marks.limit = num_steps
        if self.bench.setting.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        received = getattr(trainer, "stop_signal", None)
        if received is not None and received.number is not None:  # psft's trainer takes it as "finish the step"
            raise SystemExit(received.exit_code)

    def _loss(self) -> float | None:
        if self.arm.reports is None:
            return None
        if self.arm.reports == "log":
            return next(float(entry["loss"]) for entry in self._trainer.state.log_history if "loss" in entry)
        return float(self._first_row()[self.arm.reports])

    def _first_row(self) -> dict[str, Any]:
        """What psft wrote about the first step of the last `train()`."""
        rows = RunFolder(self._folder).read_rows("metrics.jsonl")
        return next(row for row in reversed(rows) if row["step"] == 1)


def give_rows(trainer: Any, rows: Sequence[Row]) -> None:
    """Let an existing trainer train on other rows: a new one would check its two passes against each other again."""
    trainer.train_dataset = Dataset.from_list(list(rows))
    trainer.__dict__.pop("row_lengths", None)  # a cached property of PSFTTrainer
