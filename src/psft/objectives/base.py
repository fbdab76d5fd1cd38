"""The contract every objective fulfils."""

from typing import NamedTuple

from torch import Tensor


class ObjectiveOutput(NamedTuple):
    """What one micro-batch contributes to one optimizer step.

    loss: scalar with a graph, already divided by the counted tokens of the whole step, so that micro-batches and ranks
        add up. metrics: scalars without a graph, likewise to be summed over micro-batches and ranks.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
