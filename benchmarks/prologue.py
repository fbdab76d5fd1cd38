"""Under what a benchmark ran: written into every results file, so that a number can be judged later."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import Clock
from psft.runs.environment import describe_environment


def describe_run(clock: Clock, *, device: str = "cpu") -> dict[str, Any]:
    """Versions, machine, threads, load, matmul precision with its measured error, allocator. No path of the machine."""
    return {
        **describe_environment(),
        "command": command_shown(),
        "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "clock": clock.name,
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average": load_average(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "matmul_error": matmul_error(device),
        "matmul_gflops": matmul_gflops(device),
        "allocator": allocator(),
        "liger_kernel": _version("liger-kernel"),
        "triton": _version("triton"),
        "flash_attn": _version("flash-attn"),
    }


def matmul_error(device: str = "cpu") -> dict[str, float]:
    """Largest error of one 512 x 576 x 512 product against float64, over its largest entry: float32, and bfloat16.

    About 1e-7 for true float32; 1e-4 would mean TF32, 1e-3 bfloat16, and the float32 columns would not be float32.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).to(device) for shape in ((512, 576), (576, 512)))
    exact = left.double() @ right.double()
    errors = {}
    for name, product in (("float32", left @ right), ("bfloat16", left.bfloat16() @ right.bfloat16())):
        errors[name] = float((product.double() - exact).abs().max() / exact.abs().max())
    return errors


def matmul_gflops(device: str = "cpu") -> dict[str, float]:
    """Billions of operations a second, wall time, of a (1024, 576) by (576, 1536) product: float32, and bfloat16.

    The best of a few, so that a neighbour's load shows little. It says which precision is the fast one here: that is
    not bfloat16 on every processor that has instructions for it.
    """
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        left, right = (
            torch.ones(1024, 576, dtype=dtype, device=device),
            torch.ones(576, 1536, dtype=dtype, device=device),
        )
        times = []
        for _ in range(6):
            began = time.perf_counter()
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        rates[name] = round(2 * 1024 * 576 * 1536 / min(times) / 1e9, 1)
    return rates


def load_average() -> list[float] | None:
    """Processes that wanted a core, averaged over 1, 5 and 15 minutes; None where the system has no such number."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def is_contended() -> bool:
    """Whether more processes want a core than there are cores: wall times would be of no use."""
    load = load_average()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return load is not None and load[0] > cores


def allocator() -> dict[str, str | None]:
    """What serves malloc: a preloaded library by its file name, glibc's tunables, CUDA's settings."""
    preloaded = [Path(p).name for p in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    return {
        "preloaded": ", ".join(preloaded) or None,
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "pytorch_cuda": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"),
    }


def processor_name() -> str:
    """As /proc/cpuinfo says it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def command_shown() -> str:
    """The command with file names in place of paths: results are published."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv]
    return " ".join(["python", *words])


def _version(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
