"""Kernels for rows of any length, without a device: what flash-attn and PyTorch's varlen_attn promise, row by row.

`install(monkeypatch)` puts them where transformers and psft call the real ones; `LEAKY` is an attention of transformers
that looks across borders.
"""

from itertools import pairwise

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface, modeling_flash_attention_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import import_utils

LEAKY = "fake_leaky"
KERNELS = ("flash_attention_2", "psft_varlen")
calls = dict.fromkeys(KERNELS, 0)


def _by_row(query, key, value, borders, longest, scale, window):
    """(T, heads, size) -> the same. window: tokens to the left that are seen, -1 = all."""
    assert borders.dtype == torch.int32
    borders = borders.tolist()
    assert borders[0] == 0 and borders[-1] == len(query) == len(key)
    assert isinstance(longest, int) and longest == max(b - a for a, b in pairwise(borders))
    parts = []
    for a, b in pairwise(borders):
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in (query, key, value))
        seen = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        if window >= 0:
            seen = seen.triu(-window)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """The arguments of flash-attn 2."""
    calls["flash_attention_2"] += 1
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    return _by_row(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size[0])


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    raise AssertionError("joined rows were taken for one row")


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, num_splits):
    """The arguments of torch.nn.attention.varlen.varlen_attn that are used."""
    calls["psft_varlen"] += 1
    assert window_size[1] == 0, "causal"
    assert num_splits == 1 and enable_gqa == (query.shape[1] != key.shape[1])
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
    return _by_row(query, key, value, cu_seq_q, max_q, scale, window_size[0])


def leaky(module, query, key, value, attention_mask, scaling=None, **kwargs):
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def install(monkeypatch):
    """The kernels, and `LEAKY`, until the test ends."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    utils = modeling_flash_attention_utils
    functions = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    keywords = utils._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda name, **how: (functions, (keywords, None)))
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda *args: True)
    AttentionInterface.register(LEAKY, leaky)
    AttentionMaskInterface.register(LEAKY, lambda *args, **kwargs: None)


def use(model, attention):
    """Give a model on the CPU an attention that transformers would refuse it there."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = attention
    return model
