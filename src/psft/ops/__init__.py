"""Tensor arithmetic that everything else rests on. Imports torch only."""

from psft.ops.checks import check_positive, check_same_shape
from psft.ops.token_statistics import TokenStatistics, token_statistics

IGNORE_INDEX = -100
"""Label of a position that is not trained, as in `torch.nn.functional.cross_entropy` and transformers."""

__all__ = ["IGNORE_INDEX", "TokenStatistics", "check_positive", "check_same_shape", "token_statistics"]
