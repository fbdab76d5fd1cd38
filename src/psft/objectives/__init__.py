"""One paper, one file: tensors in, `ObjectiveOutput(loss, metrics)` out; found by name or by import path."""

from psft.objectives.asft import asft_loss
from psft.objectives.base import ObjectiveOutput
from psft.objectives.chord_phi import chord_phi_loss
from psft.objectives.dft import dft_loss
from psft.objectives.eaft import eaft_loss
from psft.objectives.gem import gem_loss
from psft.objectives.iw_sft import iw_sft_loss, iw_sft_token_loss
from psft.objectives.psft import psft_loss
from psft.objectives.psft_soft import psft_smoothed_loss, psft_soft_loss
from psft.objectives.psft_tv import psft_tv_loss
from psft.objectives.registry import Objective, objective_names, resolve_objective, setting_names
from psft.objectives.sft import sft_loss
from psft.objectives.sft_kl import sft_kl_loss, sft_kl_target_loss

__all__ = [
    "Objective",
    "ObjectiveOutput",
    "asft_loss",
    "chord_phi_loss",
    "dft_loss",
    "eaft_loss",
    "gem_loss",
    "iw_sft_loss",
    "iw_sft_token_loss",
    "objective_names",
    "psft_loss",
    "psft_smoothed_loss",
    "psft_soft_loss",
    "psft_tv_loss",
    "resolve_objective",
    "setting_names",
    "sft_kl_loss",
    "sft_kl_target_loss",
    "sft_loss",
]
