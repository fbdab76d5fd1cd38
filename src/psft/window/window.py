"""The sequences that share one old policy, with the log-probs that policy gave them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from psft.window.schedule import Step

MicroBatch = dict[str, Any]
"""Model inputs of one forward pass: input_ids, labels, attention_mask, ... as the collator made them."""


@dataclass
class Window:
    """Mini-batches drawn together, trained one optimizer step each, all against the policy they were drawn under.

        Window(steps, mini_batches)              drawn; weights are those of the old policy
          -> store_old_logps(k, i, logps)        k = 1, 2, ...: one no-grad pass before the first update
          -> take() -> (step, micro-batches)     k = 0: no old pass, its ratio is 1 by definition
          -> old_logps(i)                        of the mini-batch just taken
          -> take() ... -> is_spent              then the next window re-reads the policy

    The layout (which rows share a micro-batch, padded how) is fixed when the window is drawn, so both passes see the
    same tensors. Old log-probs are float32: 4 bytes a token, no copy of the weights.
    """

    steps: list[Step]
    mini_batches: list[list[MicroBatch]]
    cursor: int = 0  # mini-batches taken so far
    _old_logps: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.steps) == len(self.mini_batches) > 0, "a window holds one list of micro-batches a step"

    @property
    def is_spent(self) -> bool:
        return self.cursor == len(self.steps)

    @property
    def mini_batch(self) -> list[MicroBatch]:
        """Micro-batches of the mini-batch last taken."""
        return self.mini_batches[self.cursor - 1]

    def take(self) -> tuple[Step, list[MicroBatch]]:
        """The next mini-batch; the window drops its own reference once the following one is taken."""
        assert not self.is_spent, "every mini-batch of this window has been trained"
        if self.cursor:
            self.mini_batches[self.cursor - 1] = []
        self.cursor += 1
        return self.steps[self.cursor - 1], self.mini_batches[self.cursor - 1]

    def store_old_logps(self, mini_batch: int, micro_batch: int, logps: Tensor) -> None:
        """Keep (B, T) log-probs of the old policy, in nats, for 0-based mini-batch and micro-batch numbers."""
        assert mini_batch >= self.cursor, "the old policy is gone once a mini-batch has been trained"
        self._old_logps[mini_batch, micro_batch] = logps.detach().float()

    def remaining(self) -> tuple[list[Step], list[list[MicroBatch]], dict[tuple[int, int], Tensor]]:
        """What is still to be trained, numbered from 0: steps, micro-batches and their old log-probs."""
        later = {(k - self.cursor, i): x for (k, i), x in self._old_logps.items() if k >= self.cursor}
        return self.steps[self.cursor :], self.mini_batches[self.cursor :], later

    @classmethod
    def resumed(
        cls, steps: list[Step], mini_batches: list[list[MicroBatch]], old_logps: dict[tuple[int, int], Tensor]
    ) -> Window:
        """The rest of a window whose first mini-batches were trained before a checkpoint: `remaining`, put back."""
        window = cls(steps, mini_batches)
        window._old_logps = dict(old_logps)
        return window

    def old_logps(self, micro_batch: int) -> Tensor | None:
        """Stored log-probs of a micro-batch of the mini-batch last taken; None where no old pass was needed."""
        return self._old_logps.get((self.cursor - 1, micro_batch))
