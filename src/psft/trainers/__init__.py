"""Training on top of TRL: the window of the old policy inside `trl.SFTTrainer`."""

from psft.trainers.psft_config import PSFTConfig
from psft.trainers.psft_trainer import PSFTTrainer

__all__ = ["PSFTConfig", "PSFTTrainer"]
