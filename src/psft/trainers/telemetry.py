"""What one optimizer step tells about itself, summed on the device and read once a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from psft.runs.rows import LOG_RATIO_EDGES
from psft.trainers.head import ScoredTokens


class StepTelemetry:
    """Sums over the micro-batches of one optimizer step.

    telemetry = StepTelemetry(device)
    telemetry.add(scored, old_logps, metrics)   # per micro-batch, no host synchronisation
    telemetry.read(reduce)                      # once: every rank's sums, as floats
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(8, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self._max = torch.zeros((), device=device)
        self._edges = torch.tensor(LOG_RATIO_EDGES, device=device)
        self._histogram = torch.zeros(len(LOG_RATIO_EDGES) + 1, dtype=torch.int64, device=device)
        self._objective: dict[str, Tensor] = {}
        self._has_ratio = False

    @torch.no_grad()
    def add(
        self,
        scored: ScoredTokens,
        old_logps: Tensor | None,
        metrics: dict[str, Tensor],
        clipped: Tensor | None = None,
    ) -> None:
        """Take in one micro-batch.

        Args:
            metrics: what the objective returned for it.
            clipped: (B, T - 1) bool, counted tokens whose gradient the bound removed; None without a bound.
        """
        mask = scored.mask
        log_ratio = torch.zeros_like(scored.logps) if old_logps is None else scored.logps - old_logps
        log_ratio = torch.where(mask, log_ratio, 0.0)
        self._has_ratio |= old_logps is not None
        ratio = torch.where(mask, log_ratio.exp(), 0.0)
        kept = ratio if clipped is None else torch.where(clipped, 0.0, ratio)
        sums = (mask, -scored.logps, scored.entropies, scored.is_top1, log_ratio, log_ratio.abs(), ratio, kept)
        self._sums += torch.stack([x.sum(dtype=self._sums.dtype) for x in sums])
        if old_logps is not None:
            bins = torch.bucketize(log_ratio.float(), self._edges).flatten()
            self._histogram.scatter_add_(0, bins, mask.flatten().long())
        if log_ratio.numel():
            self._max = torch.maximum(self._max, log_ratio.abs().max())
        for name, value in metrics.items():
            self._objective[name] = self._objective.get(name, torch.zeros_like(value)) + value

    def read(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, Any]:
        """Metrics of the step over all ranks, by their names in metrics.jsonl.

        Args:
            reduce: (tensor, "sum" or "max") -> the same over all ranks.
        """
        names = sorted(self._objective)
        parts = [self._sums, *(self._objective[n].reshape(1) for n in names), self._histogram]
        sums = reduce(torch.cat([part.to(self._sums) for part in parts]), "sum").tolist()
        tokens, nll, entropy, top1, log_ratio, log_ratio_abs, ratio, kept = sums[:8]
        objective, histogram = sums[8 : 8 + len(names)], sums[8 + len(names) :]
        counted = max(tokens, 1.0)
        ratio_metrics: dict[str, Any] = {
            "clip_fraction": None,
            "clippable_fraction": None,
            "log_ratio_mean": log_ratio / counted,
            "log_ratio_abs_mean": log_ratio_abs / counted,
            "log_ratio_abs_max": reduce(self._max, "max").item(),
            "log_ratio_histogram": [int(count) for count in histogram],
            "gradient_kept": kept / ratio if ratio > 0 else None,
        }
        if not self._has_ratio:
            ratio_metrics = dict.fromkeys(ratio_metrics)
        return {
            "tokens": int(tokens),
            "nll": nll / counted,
            "entropy": entropy / counted,
            "mean_token_accuracy": top1 / counted,
            **ratio_metrics,
            **dict(zip(names, objective, strict=True)),
        }
