"""Every figure of the report, one small module a family: what is known of the runs in, `Figure`s out, nothing drawn."""

from __future__ import annotations

from psft.reports.charts import Figure
from psft.reports.figures import clip, drift, dynamics, scores, stages, sweep, tokens
from psft.reports.figures.common import Inputs

__all__ = ["Inputs", "SECTIONS", "make_figures"]

SECTIONS = {
    "Training": (dynamics.likelihood, dynamics.entropy, drift.drift, dynamics.gradient, dynamics.reference),
    "The trust region": (clip.clip, clip.log_ratios, tokens.clipped_tokens),
    "Scores": (scores.against_entropy, scores.in_domain, scores.out_of_domain, scores.other, scores.alignment_tax),
    "Comparisons and later stages": (sweep.epsilon_sweep, stages.reinforcement, stages.preference, stages.whole_way),
}
"""The order of the page. A builder that returns None has nothing to say, and nothing is missing."""


def make_figures(inputs: Inputs) -> dict[str, list[Figure]]:
    """The figures of each section."""
    return {
        section: [figure for build in builders if (figure := build(inputs)) is not None]
        for section, builders in SECTIONS.items()
    }
