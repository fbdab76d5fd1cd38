"""psft: Proximal Supervised Fine-Tuning, its relatives and the measurements around them.

Source: Zhu et al., "Proximal Supervised Fine-Tuning", arXiv:2508.17784.

Importing the package is cheap: the trainer and its configuration are loaded on first use.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "DPOStageConfig",
    "DPOStageTrainer",
    "GRPOStageConfig",
    "GRPOStageTrainer",
    "PSFTConfig",
    "PSFTTrainer",
    "__version__",
]

if TYPE_CHECKING:
    from psft.trainers import (
        DPOStageConfig,
        DPOStageTrainer,
        GRPOStageConfig,
        GRPOStageTrainer,
        PSFTConfig,
        PSFTTrainer,
    )


def __getattr__(name: str) -> Any:
    if name != "__version__" and name in __all__:
        import psft.trainers

        return getattr(psft.trainers, name)
    raise AttributeError(f"module 'psft' has no attribute {name!r}")
