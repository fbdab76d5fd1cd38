"""PyTorch's attention for rows of any length, as an attention of transformers: `attn_implementation="psft_varlen"`.

Joined rows go to `torch.nn.attention.varlen` with the borders between them: flash-attn's kernels inside PyTorch, for
CUDA from compute capability 8.0 on, in half precision. Nothing has to be installed or compiled for it. Any other call
(padded rows, generation) is sdpa's, mask and all. Importing this module registers the name.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from psft.errors import RequestError
from psft.models.joined import rows_are_joined

NAME = "psft_varlen"
_LACKING = {"softcap": "soft-capped scores", "s_aux": "attention sinks", "position_bias": "a position bias"}


def is_in_pytorch() -> bool:
    """Whether this PyTorch has the kernel with the argument that makes a row's result its own."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "num_splits" in inspect.signature(varlen_attn).parameters


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention, each row for itself.

    Args:
        query: (1, heads, T, size). key, value: likewise, with as many heads or a divisor of it.
        attention_mask: for calls without borders, as sdpa takes it.
        sliding_window: tokens that a token sees, itself included; None = all before it.
        cu_seq_lens_q: (rows + 1,) int32, where each row begins, and T. max_length_q: tokens of the longest row.
    Returns:
        (1, T, heads, size), and None for the weights.
    Raises:
        RequestError: the model asks for what the kernel does not have.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    from torch.nn.attention.varlen import varlen_attn

    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    lacking = [words for name, words in _LACKING.items() if kwargs.get(name) is not None]
    lacking += ["dropout"] * (dropout > 0) + ["attention to later tokens"] * (not is_causal)
    if lacking:
        raise RequestError(
            f"attn_implementation={NAME} has no {' and no '.join(lacking)}, which this model asks for. Use "
            "flash_attention_2 or flex_attention, or set padding_free=false."
        )
    size = value.shape[-1]
    value = torch.nn.functional.pad(value, [0, query.shape[-1] - size])  # one size for all; a no-op as a rule
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    dtype = get_target_dtype(query, module)  # rotated queries are float32 under autocast
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    assert max_length_q is not None
    out = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
        num_splits=1,  # else a row's last bits depend on its neighbours' lengths
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None, ..., :size], None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if rows_are_joined() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
