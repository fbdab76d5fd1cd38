"""Matrix products of the LM head, with float32 results for half-precision factors where the device can."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The type in which products read their factors: on CUDA that of autocast or of half-precision hidden states, as
    its GEMM can return float32; elsewhere float32, or float64 for float64. To be asked where autocast is in force."""
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return hidden.dtype if hidden.is_cuda else torch.promote_types(hidden.dtype, torch.float32)


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, *, out: Tensor
) -> None:
    """Logits of rows of hidden states, into `out` (rows, V): product, bias, scale, soft cap, in this order."""
    product(hidden, weight.T, out=out)
    if bias is not None:
        out.add_(bias)
    if logit_scale != 1.0:
        out.mul_(logit_scale)
    if softcap is not None:
        out.div_(softcap).tanh_().mul_(softcap)


def product(left: Tensor, right: Tensor, *, out: Tensor, is_added: bool = False) -> Tensor:
    """out = left @ right, or out += left @ right; factors in the type of `right`, sums in that of `out`."""
    left = left.to(right.dtype)
    if right.dtype == out.dtype:
        return torch.addmm(out, left, right, out=out) if is_added else torch.mm(left, right, out=out)
    if is_added:
        return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_at(matrix: Tensor, labels: Tensor, values: Tensor | float) -> None:
    """matrix[i, labels[i, 0]] += values[i, 0], deterministic on every device (`scatter_add_` is not on CUDA)."""
    matrix.scatter_(1, labels, matrix.gather(1, labels) + values)
