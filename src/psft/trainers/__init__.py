"""Training on top of TRL: the window of the old policy inside `trl.SFTTrainer`.

`PSFTConfig` comes without the trainer, which brings in TRL's and with it `datasets` and pandas: a plan needs neither.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["PSFTConfig", "PSFTTrainer"]

if TYPE_CHECKING:
    from psft.trainers.psft_config import PSFTConfig
    from psft.trainers.psft_trainer import PSFTTrainer


def __getattr__(name: str) -> Any:
    if name == "PSFTConfig":
        from psft.trainers.psft_config import PSFTConfig

        return PSFTConfig
    if name == "PSFTTrainer":
        from psft.trainers.psft_trainer import PSFTTrainer

        return PSFTTrainer
    raise AttributeError(f"module 'psft.trainers' has no attribute {name!r}")
