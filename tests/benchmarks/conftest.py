"""Benchmarks run in the tests' process with one thread; what they set globally is put back."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    import torch

    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    gc.unfreeze()
    torch.set_float32_matmul_precision(before[0])
    torch.set_num_threads(before[1])
