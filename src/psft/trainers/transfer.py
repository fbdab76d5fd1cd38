"""Tensors to the accelerator without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From a CPU to CUDA through pinned memory: any other copy makes the host wait until all
    that is queued on the device is done."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # as it is, where the loader has pinned it
    return tensor.to(device, non_blocking=device.type != "mps")  # MPS may read the source after it is gone
