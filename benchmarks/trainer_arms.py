"""The trainers that are compared, each as its users would build it, on the same arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from benchmarks.arms import MakeTrainer, TrainerArm, Workbench
from benchmarks.equality import RTOL
from psft import PSFTConfig, PSFTTrainer
from psft.ops import IGNORE_INDEX

TRL_RTOL = 2e-4
"""TRL 1.16's float32 gradient on SmolLM2-135M is 2e-5 to 5e-5 from the plain one (measured on rows and parts of GSM8K;
up to 2e-4 for a single parameter), and further from float64 than that one is: 3.0e-5 against 1.8e-5. It forms p as
exp(z - logsumexp(z)) of float32 numbers, which costs digits of 1 - p where p is near 1."""

GEM_RTOL = 5e-5
"""GEM's gradient is a difference of two softmaxes, small where they agree: in float32 it was 1.8e-5 from the plain one
on a CPU without AVX-512."""

_READY: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}}  # rows come tokenised and labelled


class PlainTrainer(Trainer):
    """transformers' Trainer with the loss everyone writes first: logits of every position, `F.cross_entropy`."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        return _summed_cross_entropy(logits, _shifted(labels)) / num_items_in_batch


class CompactTrainer(Trainer):
    """The same with logits of trained positions alone: the strong plain baseline."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = _shifted(inputs.pop("labels"))
        with self.accelerator.autocast():
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
            mask = labels != IGNORE_INDEX
            logits = model.get_output_embeddings()(hidden[mask])
        return _summed_cross_entropy(logits, labels[mask]) / num_items_in_batch


def _shifted(labels: Tensor) -> Tensor:
    """Labels where their logits are: each moved one left, so that the logits need not be cut, which would copy them."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def transformers_arm(name: str, trainer_class: type[Trainer]) -> TrainerArm:
    """An arm on transformers' own Trainer, rows padded to the longest of the forward."""

    def make(bench: Workbench, folder: Path, rows: Dataset, window: int) -> Trainer:
        args = TrainingArguments(**bench.setting.accumulation(), **bench.setting.trainer_arguments(folder))
        collate = DataCollatorForLanguageModeling(pad_token_id=bench.tokenizer.pad_token_id)
        optimizers: Any = (bench.optimizer, None)
        return trainer_class(bench.model, args, collate, rows, optimizers=optimizers)

    return TrainerArm(name, "nll", make)


def trl_arm(loss_type: str, *, padding_free: bool = False) -> TrainerArm:
    """TRL's SFTTrainer, `loss_type` "nll" or "dft"."""

    def make(bench: Workbench, folder: Path, rows: Dataset, window: int) -> SFTTrainer:
        args = SFTConfig(
            loss_type=loss_type,
            padding_free=padding_free,
            max_length=None,
            **bench.setting.accumulation(),
            **_READY,
            **bench.setting.trainer_arguments(folder),
        )
        return SFTTrainer(
            bench.model,
            args,
            train_dataset=rows,
            processing_class=bench.tokenizer,
            optimizers=(bench.optimizer, None),
        )

    name = "sft" if loss_type == "nll" else loss_type
    return TrainerArm(f"trl_{name}{'_padding_free' if padding_free else ''}", loss_type, make, rtol=TRL_RTOL)


def psft_arm(
    objective: str,
    *,
    window: int = 1,
    steps: int | None = None,
    family: str = "nll",
    name: str | None = None,
    padding_free: bool = False,
    rtol: float = RTOL,
    **settings: Any,
) -> TrainerArm:
    """`PSFTTrainer` with its defaults and one objective, without the retention probe, which comes every 50 steps.

    Args:
        window: mini-batches per window.
        steps: optimizer steps of a block; default: the two that `RunningArm.block` needs, one without a window.
        family: with whom its gradient at the first step must agree. psft's ratio is 1 there and the KL of sft_kl is 0,
            so both have the gradient of the nll.
        rtol: see `TrainerArm`. settings: more fields of `PSFTConfig`.
    """
    arm = TrainerArm(
        name or (objective if window == 1 else f"{objective}_k{window}"),
        family,
        psft_trainer(PSFTTrainer, objective, padding_free, settings),
        window=window,
        steps=steps or min(window, 2),
        reports="loss" if family in ("dft", "gem") else "nll",
        rtol=rtol,
    )
    return arm


def psft_trainer(
    trainer_class: type[PSFTTrainer], objective: str, padding_free: bool, settings: dict[str, Any]
) -> MakeTrainer:
    """How an arm of ours is built."""

    def make(bench: Workbench, folder: Path, rows: Dataset, window: int) -> PSFTTrainer:
        size = bench.setting.batch_size
        args = PSFTConfig(
            objective=objective,
            train_batch_size=window * size,
            mini_batch_size=size,
            max_tokens_per_micro_batch=bench.setting.max_tokens,
            padding_free=padding_free,
            max_length=None,
            probe_every=0,
            overwrite_output_dir=True,
            **_READY,
            **bench.setting.trainer_arguments(folder),
            **settings,
        )
        return trainer_class(
            bench.model,
            args,
            train_dataset=rows,
            processing_class=bench.tokenizer,
            optimizers=(bench.optimizer, None),
        )

    return make


HF = transformers_arm("hf", PlainTrainer)
HF_COMPACT = transformers_arm("hf_compact", CompactTrainer)
TRL_SFT = trl_arm("nll")
TRL_DFT = trl_arm("dft")
SFT = psft_arm("sft")
DFT = psft_arm("dft", family="dft")
GEM = psft_arm("gem", family="gem", rtol=GEM_RTOL)
SFT_KL = psft_arm("sft_kl")


def psft(window: int, steps: int | None = None) -> TrainerArm:
    """Proximal SFT with `window` mini-batches per window; K = 1 is plain SFT through the same code."""
    return psft_arm("psft", window=window, steps=steps, name=f"psft_k{window}")


def plain_loss(family: str, model: Any, rows: list[dict[str, list[int]]]) -> Tensor:
    """What a family minimises, on full logits of each row by itself and with autograd alone: the judge of all arms.

    nll: -log p. dft: -sg(p) log p (arXiv:2508.05629). gem: -sum_v sg(q_v) (log p_y - log p_v), q = softmax(z / 0.7)
    (arXiv:2408.16673, linear weighting). Mean over the trained tokens of all rows.
    """
    total: Any = 0.0
    count = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        labels = torch.tensor(row["labels"][1:], device=model.device)
        mask = labels != IGNORE_INDEX
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1][mask].float()
        target = labels[mask][:, None]
        log_probs = torch.log_softmax(logits, -1)
        logps = log_probs.gather(1, target)
        if family == "nll":
            values = logps
        elif family == "dft":
            values = logps.exp().detach() * logps
        elif family == "gem":
            weights = torch.softmax(logits.detach() / 0.7, -1)
            values = (weights * (logps - log_probs)).sum(-1)
        else:
            raise ValueError(f"no plain loss is written for '{family}'")
        total = total - values.sum()
        count += int(mask.sum())
    return total / count
