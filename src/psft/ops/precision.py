"""Which floating-point modes this machine does well."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic


def has_native_bf16() -> bool:
    """Whether bfloat16 products run in hardware here: an accelerator that says so, or a CPU with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


MATMUL_PRECISIONS = ("auto", "highest", "high", "medium")
"""What `set_matmul_precision` takes; the last three as `torch.set_float32_matmul_precision` names them."""


def set_matmul_precision(wanted: str) -> str:
    """Set how float32 products are computed in this process, and return what is in force.

    "auto" chooses for a CPU (see `choose_cpu_matmul_precision`); on an accelerator it leaves everything as it is: there
    less than "highest" means TF32 or bfloat16, a choice for the user, who may have made it already with `tf32`.
    """
    if wanted != "auto":
        torch.set_float32_matmul_precision(wanted)
    elif not torch.accelerator.is_available():
        choose_cpu_matmul_precision()
    return matmul_precision()


def matmul_precision() -> str:
    """How float32 products are computed now: highest, high, medium, or what torch's newer interface was told (tf32)."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to translate what `tf32` of transformers sets
        backends: Any = torch.backends
        return str(backends.fp32_precision)


def choose_cpu_matmul_precision() -> str:
    """Set and return the float32 matmul precision for CPU work: "medium" where that is exact, else "highest".

    On some AMD processors "medium" routes float32 products to a library 2.6 times faster at the same precision; on
    Intel AMX processors it may round to bfloat16. So one product is checked against float64: a float32 product errs by
    about 1e-7 relative to the rows' norms, a bfloat16 one by about 1e-3.
    """
    torch.set_float32_matmul_precision("highest")
    if torch.accelerator.is_available():  # there "medium" means bfloat16 or TF32: a choice for the user
        return "highest"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    torch.set_float32_matmul_precision("medium")
    error = ((left @ right).double() - exact).abs().max() / exact.abs().max()
    if error > 1e-5:
        torch.set_float32_matmul_precision("highest")
    return torch.get_float32_matmul_precision()


@contextlib.contextmanager
def deterministic(is_wanted: bool) -> Iterator[None]:
    """Only kernels whose result does not depend on the order of threads, restored afterwards; no-op unless wanted.

    On CUDA some cost time, and an operation that has no such kernel raises, naming itself.
    """
    if not is_wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; it is needed there
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing here reads memory before writing it
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = benchmark


@contextlib.contextmanager
def exact_small_products() -> Iterator[None]:
    """Full precision mode for the few-row products of generation, restored afterwards.

    The library behind "medium" rearranges the whole weight matrix at every call: worth it for training's hundreds of
    rows, many times too dear for one token a sequence.
    """
    before = matmul_precision()
    if before not in MATMUL_PRECISIONS:  # set through torch's newer interface, for accelerators
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
