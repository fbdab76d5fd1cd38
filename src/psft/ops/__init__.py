"""Tensor arithmetic that everything else rests on. Imports torch only.

The LM head on trained tokens comes in two forms, with plain twins in `psft.ops.reference`:

    token_statistics(hidden, weight, labels, ...)        log-probs, entropies, ... of each token, differentiable
    token_loss(hidden, weight, labels, chunk_loss, ...)  a loss that is a sum over tokens, gradients in the forward pass
"""

from psft.labels import IGNORE_INDEX
from psft.ops.checks import check_choice, check_positive, check_same_shape
from psft.ops.lm_head import TokenStatistics
from psft.ops.masks import MAX_LOG_RATIO, masked_sum
from psft.ops.token_loss import ChunkLoss, TokenLoss, token_loss
from psft.ops.token_statistics import token_statistics
from psft.ops.vocabulary import (
    VOCABULARY_QUANTITIES,
    GemGap,
    ReferenceLogits,
    RefKl,
    TopKEntropy,
    VocabularyQuantity,
)

__all__ = [
    "IGNORE_INDEX",
    "MAX_LOG_RATIO",
    "VOCABULARY_QUANTITIES",
    "ChunkLoss",
    "GemGap",
    "RefKl",
    "ReferenceLogits",
    "TokenLoss",
    "TokenStatistics",
    "TopKEntropy",
    "VocabularyQuantity",
    "check_choice",
    "check_positive",
    "check_same_shape",
    "masked_sum",
    "token_loss",
    "token_statistics",
]
