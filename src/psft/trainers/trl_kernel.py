"""TRL's chunked log-prob kernel as the LM head: Triton on CUDA, the same tiles in torch elsewhere.

Its products have the type of the hidden states, bfloat16 under autocast, and are rounded to it; statistics and the sums
of gradients are float32. Four matrix products, as in `ops.token_statistics`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.utils import is_triton_available
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from psft.errors import RequestError
from psft.objectives import Objective
from psft.ops import ReferenceLogits, TokenStatistics, VocabularyQuantity

_VOCABULARY_TILE = 32768  # words projected at a time; TRL's own choice


def choose_head_kernel(wanted: str, objective: Objective, device: torch.device, dtype: torch.dtype) -> str:
    """ "torch" or "trl": the one that is wanted, or with "auto" TRL's on CUDA where it computes all that is needed.

    Args:
        dtype: of the trained model's head.
    Raises:
        RequestError: TRL's is wanted and cannot serve.
    """
    quantities = ", ".join(quantity.name for quantity in objective.vocabulary)
    lacks = None
    if quantities:
        lacks = f"objective '{objective.name}' needs {quantities} of every token, which TRL's kernel does not compute"
    elif dtype == torch.float64:
        lacks = "the model is float64, and TRL's kernel computes in float32"
    if wanted == "trl" and lacks is not None:
        raise RequestError(f"head_kernel=trl: {lacks}. Use head_kernel=torch.")
    if wanted == "auto":
        return "trl" if device.type == "cuda" and is_triton_available() and lacks is None else "torch"
    return wanted


def trl_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    logps_only: bool = False,
    quantities: tuple[VocabularyQuantity, ...] = (),
    reference: ReferenceLogits | None = None,
) -> TokenStatistics:
    """As `psft.ops.token_statistics`, without vocabulary quantities. The log-probs do not depend on `logps_only`."""
    assert not quantities and reference is None, "`choose_head_kernel` has seen to it"
    outputs = () if logps_only else ("entropy", "is_top1")
    logps, entropies, _, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden, weight, bias, labels, 1.0, _VOCABULARY_TILE, softcap, logit_scale, outputs
    )
    return TokenStatistics(logps, entropies, is_top1)
