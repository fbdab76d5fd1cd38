"""Demonstrations in, token ids with a loss mask out: reading, recognising, checking, rendering, micro-batching."""

from psft.data.demonstrations import final_answer, last_number
from psft.data.preferences import prepare_preferences, render_pair
from psft.data.prepare import Prepared, prepare_dataset, render_example
from psft.data.tally import DataReport

__all__ = [
    "DataReport",
    "Prepared",
    "final_answer",
    "last_number",
    "prepare_dataset",
    "prepare_preferences",
    "render_example",
    "render_pair",
]
