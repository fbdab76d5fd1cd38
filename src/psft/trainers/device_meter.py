"""How much memory a device has left, and how much a piece of work took at most. All numbers are bytes."""

from __future__ import annotations

import gc
from typing import Protocol

import torch

from psft.errors import RunFailed

_OUT_OF_MEMORY = ("defaultcpuallocator", "out of memory", "not enough memory", "can't allocate memory")


class DeviceMeter(Protocol):
    """Of this process on one device. name: as the vendor calls it. total: all the memory it has."""

    name: str
    total: int

    def free(self) -> int:
        """What this process can still allocate, blocks that it has cached included."""

    def in_use(self) -> int:
        """What its tensors hold now."""

    def reset_peak(self) -> None:
        """Begin to watch for the largest `in_use`."""

    def peak(self) -> int:
        """The largest `in_use` since `reset_peak`."""

    def release(self) -> None:
        """Give back what is unreachable, and what is cached and not in use."""


class CudaMeter:
    """A CUDA (or ROCm) device, by the counters of PyTorch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.name, self.total = properties.name, properties.total_memory

    def free(self) -> int:
        of_driver, _ = torch.cuda.mem_get_info(self.device)
        return of_driver + torch.cuda.memory_reserved(self.device) - self.in_use()

    def in_use(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def meter_of(device: torch.device) -> DeviceMeter | None:
    """The device's meter, or None for one whose peak cannot be measured (a CPU, Apple's GPU)."""
    return CudaMeter(device) if device.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of PyTorch raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, RunFailed)
    return is_plain and any(words in str(error).lower() for words in _OUT_OF_MEMORY)
