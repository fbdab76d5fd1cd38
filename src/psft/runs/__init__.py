"""The run folder: its files, their typed rows, whole-line writers and readers.

Everyone who writes or reads a run comes here. Imports no torch.
"""

from psft.runs.environment import command_line, describe_environment
from psft.runs.folder import RunFolder
from psft.runs.rows import EvalRow, MetricsRow, RejectedRow, RunInfo, Summary

__all__ = [
    "EvalRow",
    "MetricsRow",
    "RejectedRow",
    "RunFolder",
    "RunInfo",
    "Summary",
    "command_line",
    "describe_environment",
]
