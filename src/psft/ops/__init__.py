"""Tensor arithmetic that everything else rests on. Imports torch only."""

from psft.ops.checks import check_choice, check_positive, check_same_shape
from psft.ops.masks import MAX_LOG_RATIO, masked_sum
from psft.ops.token_statistics import TokenStatistics, token_statistics
from psft.ops.vocabulary import (
    VOCABULARY_QUANTITIES,
    GemGap,
    ReferenceLogits,
    RefKl,
    TopKEntropy,
    VocabularyQuantity,
)

IGNORE_INDEX = -100
"""Label of a position that is not trained, as in `torch.nn.functional.cross_entropy` and transformers."""

__all__ = [
    "IGNORE_INDEX",
    "MAX_LOG_RATIO",
    "VOCABULARY_QUANTITIES",
    "GemGap",
    "RefKl",
    "ReferenceLogits",
    "TokenStatistics",
    "TopKEntropy",
    "VocabularyQuantity",
    "check_choice",
    "check_positive",
    "check_same_shape",
    "masked_sum",
    "token_statistics",
]
