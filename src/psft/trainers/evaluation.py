"""Held-out NLL and entropy, exact token means over a whole data set with standard errors."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from psft.errors import RunFailed
from psft.trainers.device_meter import is_out_of_memory
from psft.trainers.layout import row_sums
from psft.trainers.stop_signal import leave_signals_to_parent

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer


@dataclass(frozen=True)
class HeldOutResult:
    """Per-row sums of one data set, (num_rows,) float64 on the CPU: tokens, nll and entropy (nats), top-1 hits."""

    tokens: Tensor
    nll: Tensor
    entropy: Tensor
    top1: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    def mean(self, name: str) -> float:
        """Mean per token of `nll`, `entropy` or `top1`."""
        return (getattr(self, name).sum() / self.tokens.sum().clamp(min=1)).item()

    def stderr(self, name: str) -> float | None:
        """Standard error of that mean with rows as clusters (tokens of a row are not independent); None for one row.

        Linearised ratio estimator: sqrt(n/(n-1) * sum_i (x_i - mean * t_i)^2) / sum_i t_i.
        """
        n = self.num_rows
        if n < 2:
            return None
        residual = getattr(self, name) - self.mean(name) * self.tokens
        return ((residual.square().sum() * n / (n - 1)).sqrt() / self.tokens.sum().clamp(min=1)).item()

    def metrics(self) -> dict[str, float]:
        """By the names evaluation logs; `loss` is the NLL, so `metric_for_best_model` works as everywhere."""
        return {
            "loss": self.mean("nll"),
            "nll": self.mean("nll"),
            "entropy": self.mean("entropy"),
            "mean_token_accuracy": self.mean("top1"),
            "num_tokens": self.tokens.sum().item(),
        }


def token_mean_evaluation(trainer: PSFTTrainer, dataloader: DataLoader[Any], description: str) -> HeldOutResult:
    """Score every row of the loader once, on all ranks, in eval mode. A progress bar appears after two seconds."""
    model = evaluation_model(trainer)
    was_training = model.training
    model.eval()
    parts = []
    if getattr(dataloader, "num_workers", 0):
        dataloader.worker_init_fn = leave_signals_to_parent
    is_quiet = bool(trainer.args.disable_tqdm) or not trainer.is_world_process_zero()
    bar = tqdm(dataloader, desc=description, delay=2, leave=False, disable=is_quiet)
    try:
        with torch.no_grad():
            for batch in bar:
                scored = trainer._score(model, batch)
                columns = (scored.mask, -scored.logps, scored.entropies, scored.is_top1)
                is_filled_up = trainer.args.pad_to_multiple_of is not None
                sums = torch.stack([row_sums(x, batch, is_filled_up=is_filled_up) for x in columns], 1)
                parts.append(trainer.accelerator.gather_for_metrics(sums).cpu())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = trainer.args.per_device_eval_batch_size
        raise RunFailed(
            f"memory ran out while held-out data were scored ({str(error).splitlines()[0][:200]}). A batch has "
            f"{size} rows: set per_device_eval_batch_size lower. The last complete checkpoint is as it was: go on with "
            "--resume."
        ) from error
    model.train(was_training)
    rows = torch.cat(parts) if parts else torch.zeros(0, 4, dtype=torch.float64)
    return HeldOutResult(*rows.unbind(1))


def evaluation_model(trainer: PSFTTrainer) -> Any:
    """The prepared model; before training it is prepared here, as `Trainer.evaluation_loop` does."""
    model = trainer._wrap_model(trainer.model, training=False)
    if len(trainer.accelerator._models) == 0 and model is trainer.model:
        start = time.monotonic()
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            model = trainer.accelerator.prepare(model)
        else:
            model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
        trainer.model_preparation_time = round(time.monotonic() - start, 4)
        if trainer.is_fsdp_enabled:
            trainer.model = model
        if model is not trainer.model:
            trainer.model_wrapped = model
    return model
