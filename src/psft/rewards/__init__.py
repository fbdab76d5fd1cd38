"""Graders: strings in, score and reason out. Evaluation and the reinforcement-learning stages share them. No torch."""

from psft.rewards.base import Grade, Grader
from psft.rewards.pool import grade_rows
from psft.rewards.registry import get_grader, grader_names

__all__ = ["Grade", "Grader", "get_grader", "grade_rows", "grader_names"]
