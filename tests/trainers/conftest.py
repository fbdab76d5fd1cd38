"""Runs of a tiny model in milliseconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def make_trainer(
    tmp_path: Path, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, demonstrations: Any
) -> Callable[..., Any]:
    """make_trainer(name="run", model=None, eval_dataset=None, **settings) -> PSFTTrainer, tiny, float32, CPU."""

    def make(name: str = "run", model: Any = None, train_dataset: Any = None, **settings: Any) -> Any:
        from psft import PSFTConfig, PSFTTrainer

        trainer_arguments = {
            key: settings.pop(key)
            for key in ("eval_dataset", "peft_config", "callbacks", "compute_loss_func")
            if key in settings
        }
        defaults = {
            "output_dir": str(tmp_path / name), "train_batch_size": 16, "mini_batch_size": 4, "learning_rate": 1e-2,
            "lr_scheduler_type": "constant", "max_steps": 8, "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
            "max_tokens_per_micro_batch": 64,
        }  # fmt: skip
        return PSFTTrainer(
            model=make_tiny_model() if model is None else model,
            args=PSFTConfig(**{**defaults, **settings}),
            train_dataset=demonstrations if train_dataset is None else train_dataset,
            processing_class=tiny_tokenizer,
            **trainer_arguments,
        )

    return make
