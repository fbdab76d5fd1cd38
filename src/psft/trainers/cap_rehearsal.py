"""Training steps that leave no trace: forward and backward as in a run, then everything is put back."""

from __future__ import annotations

import random
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from psft.data.microbatch import MiniBatchCollator, NumberedRows
from psft.window import Step, Window

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer


class Rehearsal:
    """`with Rehearsal(trainer) as rehearsal: rehearsal.run(4)` trains on the longest row, four times over.

    No optimizer step is taken. Afterwards weights, buffers, gradients, optimizer, random state and the trainer's place
    are what they were, to the bit. The model is called without DistributedDataParallel around it, whose buckets would
    remember; a sharded one as it is, so every rank must rehearse.
    """

    def __init__(self, trainer: PSFTTrainer) -> None:
        self.trainer = trainer
        lengths = trainer.row_lengths
        dataset: Any = trainer._remove_unused_columns(trainer.train_dataset, description="training")
        number = lengths.index(max(lengths))
        (self._row,) = NumberedRows(dataset).__getitems__([[number]])[0]
        if "labels" in self._row:  # every token trained: no row can take more
            self._row = {**self._row, "labels": self._row["input_ids"]}

    def __enter__(self) -> Rehearsal:
        trainer = self.trainer
        if trainer.reference is not None:
            trainer.reference.is_rehearsed = True
            if trainer.objective.needs_ref_vocabulary:
                trainer.reference.place()  # it takes its memory now, as in training
        model = trainer.model
        _shard_again(model)
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._without_grad = [parameter for parameter in model.parameters() if parameter.grad is None]
        self._was_training = model.training
        self._place = (trainer._window, trainer._current_step, trainer.recorder.telemetry, trainer.recorder.loss)
        self._random = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        device = trainer.args.device
        self._device_random = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return self

    def run(self, num_rows: int) -> None:
        """One step of a mini-batch with one micro-batch. May run out of memory."""
        trainer = self.trainer
        inputs = MiniBatchCollator(trainer.data_collator)([[self._row] * num_rows])
        step = Step(window=0, mini_batch=1, num_mini_batches=1, start=0, stop=num_rows)
        trainer._window = Window([step], [inputs["micro_batches"]])
        trainer._current_step, _ = trainer._window.take()
        num_tokens = sum((m["labels"][:, 1:] != -100).sum() for m in inputs["micro_batches"])
        trainer.training_step(trainer.model, inputs, torch.as_tensor(num_tokens, device=trainer.args.device))
        trainer.recorder.telemetry = trainer.recorder.loss = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        trainer = self.trainer
        trainer._window, trainer._current_step, trainer.recorder.telemetry, trainer.recorder.loss = self._place
        for parameter in self._without_grad:
            parameter.grad = None
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        trainer.model.train(self._was_training)
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])
        torch.set_rng_state(self._random[2])
        if self._device_random is not None:
            device = trainer.args.device
            torch.get_device_module(device).set_rng_state(self._device_random, device)
        if trainer.reference is not None:
            trainer.reference.is_rehearsed = False


def _shard_again(model: torch.nn.Module) -> None:
    """Let FSDP2 put its shards back in place of whole parameters.

    After a forward without gradients, such as the retention probe's, it leaves the outermost whole: gradients would be
    looked for there, and come to the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
