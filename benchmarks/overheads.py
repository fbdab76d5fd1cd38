"""What surrounds the model's operations: our trainer against a bare loop, telemetry on and off, the entropy.

The bare loop takes the micro-batches our trainer cuts, made beforehand, and does with them what any trainer must:
forward, loss, backward, clipping, optimizer. It shares the operations of the head with the trainer, nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor

from benchmarks.arms import Workbench, give_rows
from benchmarks.equality import RTOL, Outcome, gradients_of
from benchmarks.harness import Block
from benchmarks.head_peers import token_mean_nll
from benchmarks.trainer_arms import SFT, psft_arm, psft_trainer
from benchmarks.workload import Row, Tokens
from psft import PSFTTrainer
from psft.data.microbatch import ROW_NUMBERS
from psft.ops import IGNORE_INDEX, token_statistics
from psft.ops.precision import deterministic
from psft.trainers.telemetry import StepTelemetry


@dataclass(frozen=True)
class BareArm:
    """Plain SFT in a loop of a few lines, with our head and micro-batches."""

    name: str = "bare_sft"
    family: str = "nll"
    window: int = 1
    rtol: float = RTOL

    def on(self, bench: Workbench) -> RunningBareLoop:
        return RunningBareLoop(self, bench)


class RunningBareLoop:
    """Same calls as `benchmarks.arms.RunningArm`."""

    def __init__(self, arm: BareArm, bench: Workbench) -> None:
        self.arm, self.bench = arm, bench
        self._trainer: Any = None

    def block(self, mini_batches: Sequence[Sequence[Row]]) -> Block:
        prepared = [self._micro_batches(rows) for rows in mini_batches]
        self.bench.restore()
        clock = self.bench.clock
        with self._modes():
            start = clock.mark()
            losses = [self._step(micro_batches) for micro_batches in prepared]
            end = clock.mark()
        tokens = Tokens.of([row for rows in mini_batches for row in rows])
        shares = {f"{kind}_tokens": count / len(mini_batches) for kind, count in tokens.to_dict().items()}
        return Block(clock.seconds(start, end) / len(mini_batches), {**shares, "loss": float(losses[0])})

    def warm_up(self, rows: Sequence[Row]) -> None:
        self.block([rows])

    def outcome(self, rows: Sequence[Row]) -> Outcome:
        micro_batches = self._micro_batches(rows)
        self.bench.restore()
        with self._modes():
            loss = self._gradients(micro_batches)
        return Outcome(float(loss), gradients_of(self.bench.model))

    def close(self) -> None:
        self._trainer = None
        self.bench.restore()

    def _micro_batches(self, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        if self._trainer is None:
            self.bench.restore()
            folder = self.bench.folder / self.arm.name
            self._trainer = SFT.make(self.bench, folder, Dataset.from_list(list(rows)), 1)
        give_rows(self._trainer, rows)
        (mini_batch,) = self._trainer.get_train_dataloader()
        device = self.bench.setting.device
        return [
            {name: value.to(device) for name, value in micro_batch.items() if name != ROW_NUMBERS}
            for micro_batch in mini_batch["micro_batches"]
        ]

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        """The modes our trainer runs in."""
        self.bench.model.train()
        with deterministic(self.bench.setting.device == "cpu"):
            yield

    def _gradients(self, micro_batches: list[dict[str, Tensor]]) -> Tensor:
        bench, setting = self.bench, self.bench.setting
        num_tokens = sum((m["labels"][:, 1:] != IGNORE_INDEX).sum() for m in micro_batches)
        total = torch.zeros((), device=setting.device)
        for inputs in micro_batches:
            with torch.autocast(setting.device, torch.bfloat16, enabled=setting.dtype == "bfloat16"):
                # Rows are padded on the right and attention is causal: no trained position sees a pad, so no mask.
                hidden = bench.model.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
                labels = inputs["labels"][:, 1:]
                mask = labels != IGNORE_INDEX
                loss = token_mean_nll(
                    hidden[:, :-1][mask], bench.model.get_output_embeddings().weight, labels[mask], num_tokens
                )
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(bench.model.parameters(), 1.0)
        return total

    def _step(self, micro_batches: list[dict[str, Tensor]]) -> Tensor:
        loss = self._gradients(micro_batches)
        self.bench.optimizer.step()
        self.bench.model.zero_grad(set_to_none=True)
        return loss


class _NoTelemetry(StepTelemetry):
    """Telemetry that looks at nothing. Only for timing: its rows are empty."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        pass


class SilentTrainer(PSFTTrainer):
    """Our trainer without telemetry."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with mock.patch("psft.trainers.psft_trainer.StepTelemetry", _NoTelemetry):
            return super().training_step(*args, **kwargs)


BARE = BareArm()
_plain = psft_arm("sft", name="sft_silent")
SILENT = type(_plain)(_plain.name, _plain.family, psft_trainer(SilentTrainer, "sft", False, {}), reports=None)


def entropy_seconds(bench: Workbench, rows: Sequence[Row], *, repetitions: int) -> list[float]:
    """Seconds that entropies and top-1 hits of one mini-batch's trained tokens take in the head: scored with them less
    scored for log-probs alone, on random hidden states and the model's head."""
    trained, device = Tokens.of(rows).trained, bench.setting.device
    weight = bench.model.get_output_embeddings().weight
    generator = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(trained, weight.shape[1], generator=generator, device=device)
    labels = torch.arange(trained, device=device) % len(weight)
    clock, differences = bench.clock, []

    def seconds(logps_only: bool) -> float:
        start = clock.mark()
        token_statistics(hidden, weight, labels, logps_only=logps_only)
        return clock.seconds(start, clock.mark())

    with torch.no_grad():
        for repetition in range(1 + repetitions):
            difference = seconds(False) - seconds(True)
            if repetition:
                differences.append(difference)
    return differences
