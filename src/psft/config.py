"""Every psft setting beside those of `trl.SFTConfig`, as plain dataclasses. Imports no torch, so commands start fast.

`PSFTConfig` (in `psft.trainers`) is `PSFTFields` on top of `trl.SFTConfig`; the command line adds where data and
model come from. YAML keys, flags and Python arguments all spell these names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class DataArguments:
    """Where the demonstrations come from and how a row becomes a training sequence."""

    dataset: str | None = _setting(
        None,
        "Demonstrations: hub id, .jsonl(.gz)/.json/.parquet/.csv file, save_to_disk folder, or reasoning-gym:TASK.",
    )
    dataset_config: str | None = _setting(None, "Configuration name of a hub data set.")
    dataset_split: str = _setting("train", "Split of a hub data set or save_to_disk folder.")
    eval_dataset: list[str] | None = _setting(None, "Held-out data, each as SOURCE or NAME=SOURCE; may be repeated.")
    eval_split: str = _setting("test", "Split of hub data sets given as eval_dataset.")
    dataset_format: str = _setting("auto", "Row format; auto recognises it from the fields and says which it found.")
    columns: dict[str, str] | None = _setting(
        None, "Field names of your data, as role=column, e.g. question=q,answer=a."
    )
    system_prompt: str | None = _setting(None, "System prompt put before every conversation that has none.")
    on_bad_row: str = _setting(
        "error", "error: stop and list the first ten bad rows; skip: leave them out, each recorded."
    )
    max_rows: int | None = _setting(None, "Use only the first N rows.")


@dataclass(kw_only=True)
class ModelArguments:
    """Which model is trained and in what form."""

    model_name_or_path: str | None = _setting(
        None, "Hub id, local folder, or smollm2-135m-instruct (bundled quick start)."
    )
    model_revision: str = _setting("main", "Revision of a hub model.")
    dtype: str = _setting("float32", "Weights: float32 (bf16 autocast computes) or bfloat16 (needs force_pure_bf16).")
    attn_implementation: str | None = _setting(
        None, "Attention kernel of transformers, e.g. sdpa or flash_attention_2."
    )
    use_peft: bool = _setting(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = _setting(16, "LoRA rank.")
    lora_alpha: int = _setting(32, "LoRA scale numerator: the update is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = _setting(0.0, "LoRA dropout; PSFT requires 0, see docs.")
    lora_target_modules: list[str] | None = _setting(
        None, "Module names that get an adapter; default: all linear layers."
    )


@dataclass(kw_only=True)
class PSFTFields:
    """What PSFT adds to `trl.SFTConfig`. Batch sizes count sequences over all ranks."""

    objective: str = _setting("psft", "Registered objective (psft, sft) or an import path module:function.")
    epsilon_high: float = _setting(0.28, "The ratio is clipped at 1 + epsilon_high; inf switches clipping off.")
    train_batch_size: int | None = _setting(None, "Window: sequences that share one old policy. Default 256.")
    mini_batch_size: int | None = _setting(None, "Sequences of one optimizer step. Default 32.")
    max_tokens_per_micro_batch: int | str = _setting(
        "auto", "Hard cap on padded tokens of one forward pass on one device."
    )
    sft_warmup_steps: int = _setting(0, "Optimizer steps of plain SFT before PSFT starts, on the same step axis.")
    sft_warmup_mini_batch_size: int | None = _setting(None, "Mini-batch of the warm-up. Default: train_batch_size.")
    sft_warmup_learning_rate: float | None = _setting(None, "Learning rate of the warm-up. Default: learning_rate.")
    force_pure_bf16: bool = _setting(False, "Allow bfloat16 weights although updates at lr 1e-6 vanish in them.")
    allow_ratio_noise: bool = _setting(False, "Warn instead of stop when old pass and training pass differ.")
    overwrite_output_dir: bool = _setting(False, "Replace the run that output_dir holds.")
