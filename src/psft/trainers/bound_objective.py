"""An objective with all that one micro-batch needs: what the model's forward is handed to compute a loss with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from psft.objectives import Objective, ObjectiveOutput
from psft.ops import ChunkLoss, ReferenceLogits, TokenStatistics
from psft.trainers.layout import TrainedTokens


@dataclass(frozen=True)
class BoundObjective:
    """It goes through the forward of whatever wraps the model as one object, not as tensors: FSDP2 with mixed precision
    would round float32 log-probs among the arguments to bfloat16.

    normalizer: what a micro-batch's sum is divided by.
    constants: (B, T - 1) by the objective's names for them, e.g. old_logps. Without old_logps an objective that needs
        them gets the policy's own: the first mini-batch of a window.
    reference: what gives the frozen reference's logits at the trained tokens. overrides: settings that a controller has
        moved.
    """

    objective: Objective
    normalizer: Tensor | float
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    reference: ReferenceLogits | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def on_chunks(self, tokens: TrainedTokens) -> ChunkLoss:
        """For an objective that looks at one token at a time: called on any of the tokens, as (1, n) each."""
        constants = {name: tokens.values_of(values) for name, values in self.constants.items()}

        def chunk_loss(statistics: TokenStatistics, rows: slice) -> ObjectiveOutput:
            of_rows = {name: values[None, rows] for name, values in constants.items()}
            return self._evaluated(statistics, of_rows, lambda values: values[None])

        return chunk_loss

    def on_layout(self, statistics: TokenStatistics, tokens: TrainedTokens) -> ObjectiveOutput:
        """On all tokens of the micro-batch in their places, (B, T - 1) each."""
        return self._evaluated(statistics, self.constants, tokens.placed)

    def _evaluated(
        self, statistics: TokenStatistics, constants: Mapping[str, Tensor], shaped: Callable[[Tensor], Tensor]
    ) -> ObjectiveOutput:
        computed = {
            "logps": statistics.logps,
            "entropies": statistics.entropies,
            "completion_mask": torch.ones_like(statistics.logps, dtype=torch.bool),
            **statistics.quantities,
        }
        if self.objective.needs_old_logps and "old_logps" not in constants:
            computed["old_logps"] = statistics.logps.detach()  # the weights are still the old policy's
        needed = {name: shaped(values) for name, values in computed.items() if name in self.objective.needs}
        return self.objective(**needed, **constants, normalizer=self.normalizer, overrides=self.overrides)
