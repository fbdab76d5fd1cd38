"""What would make the ratio of PSFT meaningless: refused, switched off or announced, always in words."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from psft.errors import RequestError
from psft.trainers.head import ScoredTokens
from psft.trainers.psft_config import PSFTConfig

logger = logging.getLogger(__name__)

_DROPOUT_ATTRIBUTES = ("dropout", "attention_dropout", "attn_pdrop", "hidden_dropout")  # rates kept outside nn.Dropout


def refuse_request(args: Any, train_dataset: Any, compute_loss_func: Any) -> None:
    """Raise `RequestError` for constructor arguments that a window cannot work with."""
    if not isinstance(args, PSFTConfig):
        raise RequestError(
            f"args is a {type(args).__name__}; PSFTTrainer needs a psft.PSFTConfig (same fields and more)."
        )
    if compute_loss_func is not None:
        raise RequestError("compute_loss_func bypasses the objective. Give objective='module:function' in PSFTConfig.")
    if train_dataset is not None and not hasattr(train_dataset, "__len__"):
        raise RequestError(
            "a streaming train_dataset has no known length, so its windows cannot be laid out. "
            "Load it without streaming=True (e.g. datasets.Dataset.from_generator)."
        )
    if train_dataset is not None and not len(train_dataset):
        raise RequestError("the training set has no rows. Give at least one demonstration.")


def refuse_model(model: Any, args: PSFTConfig, *, has_router_loss: bool) -> None:
    """Raise `RequestError` for a model whose log-probs or updates PSFT cannot be exact about."""
    if has_router_loss:
        raise RequestError(
            "this model adds a router auxiliary loss, which has no place in the clipped objective yet. "
            "Set router_aux_loss_coef=0."
        )
    if args.sft_warmup_optimizer_state == "reset" and args.deepspeed:
        raise RequestError(
            "sft_warmup_optimizer_state=reset cannot reach the moments that DeepSpeed keeps inside its engine. Use "
            "keep, or train the warm-up as a run of its own and go on from its weights."
        )
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise RequestError("prompt-learning adapters change the sequence. Use a LoRA-like adapter.")
    refuse_coarse_weights(model, args)


def refuse_coarse_weights(model: Any, args: Any) -> None:
    """Raise `RequestError` for trained weights whose type swallows the update, unless `force_pure_bf16` is set."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    coarse = sorted(str(d).removeprefix("torch.") for d in trained & {torch.bfloat16, torch.float16})
    is_quantized = any(getattr(model, name, False) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"))
    if coarse and not is_quantized and not args.force_pure_bf16:
        raise RequestError(
            f"trainable weights are {', '.join(coarse)}: an update at learning_rate={args.learning_rate:g} is rounded "
            "away and nothing is learnt. Load the model in float32 (bf16=True still computes in bfloat16), or set "
            "force_pure_bf16=true."
        )


def check_longest_row(trainer: Any) -> None:
    """Raise `RequestError` for a row over the hard cap now, and not when its turn comes, in a worker, hours later."""
    cap = trainer.args.max_tokens_per_micro_batch
    if cap == "auto":
        return
    longest, number = max(((length, -i) for i, length in enumerate(trainer.row_lengths)))
    if longest > cap:
        raise RequestError(
            f"max_tokens_per_micro_batch={cap} is a hard cap, but a training sequence has {longest} tokens "
            f"(row {-number}). Raise it to at least {longest}, or lower max_length."
        )


def check_free_space(trainer: Any) -> None:
    """Raise `RequestError` if the disk of `output_dir` has no room for one checkpoint: weights and AdamW's moments."""
    args = trainer.args
    if args.save_strategy == "no" or not args.should_save:
        return
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    weights = trained if is_peft_model(trainer.model) else _size_of(trainer.model)
    needed = weights + (0 if args.save_only_model else 2 * trained)
    free = shutil.disk_usage(args.output_dir).free
    if free < needed:
        raise RequestError(
            f"a checkpoint takes about {needed / 2**30:.1f} GiB and {args.output_dir} has {free / 2**30:.1f} GiB left. "
            "Make room, name another --output_dir, or set save_strategy=no."
        )


def _size_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def switch_dropout_off(model: nn.Module, method: str = "PSFT") -> None:
    """Set every dropout rate to 0 and say so: different masks in two passes would make their ratio noise."""
    active = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = 0.0
            active.add(name.rsplit(".", 1)[-1] or "dropout")
        for attribute in _DROPOUT_ATTRIBUTES:
            value = getattr(module, attribute, None)
            if isinstance(value, float) and value > 0:
                setattr(module, attribute, 0.0)
                active.add(attribute)
    if active:
        others = " and ".join(name for name in ("PSFT", "DPO", "GRPO") if name != method)
        logger.warning(
            "dropout is off during %s, as in %s; the model had: %s.", method, others, ", ".join(sorted(active))
        )


def announce_plain_sft(args: PSFTConfig) -> None:
    """Say that PSFT with one mini-batch a window is plain SFT, which a common mistake makes it."""
    if args.mini_batch_size == args.train_batch_size:
        logger.warning(
            "mini_batch_size equals train_batch_size=%d: every ratio is 1 and nothing is ever clipped. "
            "This is plain SFT. For PSFT make mini_batch_size smaller, e.g. train_batch_size / 8.",
            args.train_batch_size,
        )


def check_passes_agree(old_pass: Tensor, scored: ScoredTokens, model: nn.Module, *, allow_noise: bool) -> None:
    """Compare one micro-batch scored by both passes at equal weights: bit-equal, or the ratio starts as noise.

    Raises:
        RequestError: they differ and `allow_noise` is False; with it a warning says by how much.
    """
    training_pass = scored.logps.detach()
    if torch.equal(old_pass, training_pass):
        return
    noise = (old_pass - training_pass).abs()[scored.mask]
    dropout = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0 and m.training]
    cause = (
        f"dropout is active ({dropout[0]})"
        if dropout
        else "a layer that depends on training mode or on gradients being on, a kernel that is not deterministic, "
        "or a compiled graph that differs with and without gradients"
    )
    message = (
        "the old pass and the training pass disagree at equal weights: log-probs differ by "
        f"{noise.mean().item():.2e} nats on average, {noise.max().item():.2e} at most. Likely cause: {cause}."
    )
    if not allow_noise:
        raise RequestError(f"{message} Remove the cause, or accept the noise with allow_ratio_noise=true.")
    logger.warning("%s Going on, as allow_ratio_noise asks.", message)
