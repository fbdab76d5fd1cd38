"""Whoever answers: a model here (`hf`, `vllm`), a server (`openai`), or answers from a file (`replay`)."""

from __future__ import annotations

from psft.evaluation.backends.base import Answer, Backend, Description, Failure, Outcome, Request

__all__ = ["BACKENDS", "Answer", "Backend", "Description", "Failure", "Outcome", "Request"]

BACKENDS = ("hf", "vllm", "openai", "replay")
