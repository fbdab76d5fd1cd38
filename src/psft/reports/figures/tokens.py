"""Which tokens the clip holds back, per epoch (paper, figure 8): the most clipped as a cloud, and a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psft.reports.charts import Figure, Missing
from psft.reports.figures.common import NO_CLIP, NO_STEPS, Inputs, needs
from psft.reports.groups import epsilon_high
from psft.reports.load import Epoch, Run

MOST_CLOUDS = 12
"""Clouds on one page: per run the first, the last and evenly many between."""
TABLE_ROWS = 20
CLOUD_TOKENS = 45


@dataclass(frozen=True)
class Cloud:
    """The tokens of one run clipped most in one epoch."""

    run: str
    style: int
    epoch: Epoch

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run, "epoch": self.epoch.epoch, "clipped": self.epoch.clipped, "seen": self.epoch.seen,
            "num_tokens": self.epoch.num_tokens, "tokens": self.epoch.tokens[:CLOUD_TOKENS],
        }  # fmt: skip

    def size(self, token: dict[str, Any]) -> float:
        """0..1, by the square root of how often the token was clipped: areas compare."""
        most = max((int(row.get("clipped") or 0) for row in self.epoch.tokens), default=1)
        return (int(token.get("clipped") or 0) / max(most, 1)) ** 0.5


def visible(text: Any) -> str:
    """A token as a person can see it: spaces, tabs and line ends as signs, other control characters by their code."""
    signs = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}
    shown = "".join(signs.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in str(text))
    return shown if len(shown) <= 60 else shown[:59] + "\u2026"


def clipped_tokens(inputs: Inputs) -> Figure:
    recorded = [(group, run) for group in inputs.groups for run in group.runs if any(e.tokens for e in run.clipped)]
    with_tokens = list({group.style: (group, run) for group, run in reversed(recorded)}.values())[::-1]  # one a setting
    clouds: list[Cloud] = []
    notes = []
    for group, run in with_tokens[:MOST_CLOUDS]:
        most = max(1, MOST_CLOUDS // min(len(with_tokens), MOST_CLOUDS))
        chosen = _spread([epoch for epoch in run.clipped if epoch.tokens], most)
        clouds += [Cloud(run.label, group.style, epoch) for epoch in chosen]
    num_epochs = sum(bool(epoch.tokens) for _, run in recorded for epoch in run.clipped)
    if num_epochs > len(clouds):
        notes.append(
            f"{num_epochs - len(clouds)} more epochs, or seeds of the same setting, have clipped tokens: all are in "
            "the table files."
        )
    return Figure(
        "clipped_tokens",
        "Clipped tokens, epoch by epoch",
        "The tokens whose gradient the clip removed most often; larger is more often. In the paper they are words of "
        "hedging early on (wait, alternatively). A high share says the model is being pushed there faster than the "
        "bound allows. \u2423 is a space, \u21b5 a line end.",
        missing=None if clouds else _missing(inputs),
        paper="8",
        notes=notes,
        clouds=clouds,
    )


def _spread(epochs: list[Epoch], most: int) -> list[Epoch]:
    if len(epochs) <= most:
        return epochs
    if most == 1:
        return epochs[-1:]
    return [epochs[round(i * (len(epochs) - 1) / (most - 1))] for i in range(most)]


def _missing(inputs: Inputs) -> Missing:
    runs: list[Run] = inputs.runs
    if any(run.clipped for run in runs):
        return Missing("No token was clipped: the bound was never reached.")
    with_clip = [run for run in runs if epsilon_high(run) is not None] or runs
    if not any(run.num_steps for run in runs):
        return NO_STEPS
    tracking = [run for run in with_clip if run.config.get("track_clipped_tokens") and epsilon_high(run) is not None]
    if any(not run.is_over for run in tracking):
        return Missing("Clipped tokens are counted, and stand here once the first epoch, or the run, has ended.")
    if epsilon_high(with_clip[0]) is None:
        return needs(inputs, NO_CLIP, changes={"objective": "psft"}, suffix="-psft")
    changes: dict[str, object] = {"track_clipped_tokens": True}
    reason = "No clipped tokens were recorded (clipped_tokens.parquet is written at the end of an epoch). Train with:"
    return needs(inputs, reason, changes=changes, suffix="-tokens")
