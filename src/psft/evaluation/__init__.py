"""Asking a model questions and grading its answers."""
