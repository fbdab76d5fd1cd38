"""Training on top of TRL: the window of the old policy inside `trl.SFTTrainer`, and the stages after it.

`PSFTConfig` comes without the trainer, which brings in TRL's and with it `datasets` and pandas: a plan needs neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["DPOStageConfig", "DPOStageTrainer", "GRPOStageConfig", "GRPOStageTrainer", "PSFTConfig", "PSFTTrainer"]

_MODULES = {
    "DPOStageConfig": "dpo_config",
    "DPOStageTrainer": "dpo_trainer",
    "GRPOStageConfig": "grpo_config",
    "GRPOStageTrainer": "grpo_trainer",
    "PSFTConfig": "psft_config",
    "PSFTTrainer": "psft_trainer",
}

if TYPE_CHECKING:
    from psft.trainers.dpo_config import DPOStageConfig
    from psft.trainers.dpo_trainer import DPOStageTrainer
    from psft.trainers.grpo_config import GRPOStageConfig
    from psft.trainers.grpo_trainer import GRPOStageTrainer
    from psft.trainers.psft_config import PSFTConfig
    from psft.trainers.psft_trainer import PSFTTrainer


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"psft.trainers.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'psft.trainers' has no attribute {name!r}")
