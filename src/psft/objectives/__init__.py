"""One paper, one file: tensors in, `ObjectiveOutput(loss, metrics)` out; found by name or by import path."""

from psft.objectives.base import ObjectiveOutput
from psft.objectives.psft import psft_loss
from psft.objectives.registry import Objective, objective_names, resolve_objective
from psft.objectives.sft import sft_loss

__all__ = ["Objective", "ObjectiveOutput", "objective_names", "psft_loss", "resolve_objective", "sft_loss"]
