"""Small GRPO runs on the tiny model, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets


def prompts(count: int = 8) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"How many clips? {n}"}], "number": n} for n in range(count)]
    )


def config(folder: Path, **settings: Any) -> Any:
    """A GRPOStageConfig of 4 prompts of 4 answers of at most 6 tokens, one optimizer step to a batch."""
    from psft.trainers.grpo_config import GRPOStageConfig

    defaults: dict[str, Any] = {
        "output_dir": str(folder), "train_batch_size": 4, "mini_batch_size": 4, "num_generations": 4,
        "max_completion_length": 6, "overlong_buffer": 0, "max_steps": 2, "learning_rate": 1e-3, "bf16": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
        "logging_steps": 1, "seed": 3,
    }  # fmt: skip
    return GRPOStageConfig(**{**defaults, **settings})


def letters(completions: Any, **_: Any) -> list[float]:
    """1 for an answer with an `e`: about half of what the tiny model says."""
    return [float("e" in completion[0]["content"]) for completion in completions]
