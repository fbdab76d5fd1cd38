"""Pipelines: stages of psft commands, one after the other, each skipped where its result is there already.

    definition   a YAML file -> stages with references to earlier ones; everything wrong is refused before anything runs
    stage        one stage, its references
    commands     what each command takes from the pipeline and gives to later stages; the command line of a stage
    keys         what a stage's result follows from, by content; what has changed since, in words
    state        pipeline.json, written whole
    process      one stage in a process of its own: its log, signals, the lock on the folder
    executor     which stages run, and running them

Imports neither torch nor a command.
"""

from psft.pipelines.definition import Pipeline, read_pipeline
from psft.pipelines.executor import Executor
from psft.pipelines.stage import Reference, Stage

__all__ = ["Executor", "Pipeline", "Reference", "Stage", "read_pipeline"]
