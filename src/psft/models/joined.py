"""What a forward pass is known to be about its rows, told to transformers, which would ask the device.

transformers 5.23 looks into `position_ids` in every forward pass without a mask, to see whether rows are joined, and
the host waits for the answer behind all that is queued. A caller that gives borders, or no positions, has said it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

_is_joined = False


def rows_are_joined() -> bool:
    """Whether the forward pass under way has joined rows and gives their borders."""
    return _is_joined


@contextlib.contextmanager
def known_rows(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Around one forward pass with these inputs. Positions without borders are looked into as ever."""
    global _is_joined
    before, _is_joined = _is_joined, "cu_seq_lens_q" in inputs and "position_ids" in inputs
    look = masking_utils.find_packed_sequence_indices
    if not torch.compiler.is_compiling():  # then transformers does not ask
        if _is_joined:
            masking_utils.find_packed_sequence_indices = _row_numbers
        elif "position_ids" not in inputs:
            masking_utils.find_packed_sequence_indices = _one_row_each
    try:
        yield
    finally:
        _is_joined = before
        masking_utils.find_packed_sequence_indices = look


def _row_numbers(position_ids: Tensor) -> Tensor:
    """(B, T): the number of each token's row, counted where positions do not go on by one."""
    first = position_ids[:, :1] - 1
    return (position_ids.diff(prepend=first, dim=-1) != 1).cumsum(-1)


def _one_row_each(position_ids: Tensor) -> None:
    return None
