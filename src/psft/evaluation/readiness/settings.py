"""What can be set of RL readiness beside what `psft eval` sets for every evaluation. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

READINESS = "rl-readiness"
"""The name in `--suite` that asks for it, and of the prompts that come with psft."""


@dataclass
class ReadinessSettings:
    """RL readiness (rl-readiness)"""

    group_size: int = field(
        default=8,
        metadata={"help": "Answers a prompt gets in RL (paper: 8), for the share of mixed groups."},
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "The model before fine-tuning: drift is measured from it. Default: what the run's own retention "
            "probe has recorded."
        },
    )
