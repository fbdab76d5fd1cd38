"""What models on this machine have in common: batches over all requests, prompts as token ids, answers read.

Batches are cut over all requests of a benchmark, done or not, so a sample always has the same neighbours and the same
padding, whatever was done before and however many processes share the work.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from psft.data.templates import render_chat
from psft.errors import RequestError, RunFailed, first_line, shown
from psft.evaluation.backends.base import Answer, Request
from psft.evaluation.backends.sampling import RowSampler
from psft.ops.precision import exact_small_products


class BatchedBackend(ABC):
    """Batches over all requests, prompts in ids, answers read: what every model on this machine has in common.

    Who has the model sets the tokenizer, the ends (token ids that end an answer) and the context (tokens that a prompt
    and its answer may have; None = no limit). folder: for messages.
    """

    name = "hf"
    batch_size_setting = "--batch_size"
    how_to_go_on = "the same command goes on from here"

    def __init__(self, folder: str, *, device: str, batch_size: int) -> None:
        self.folder = folder
        self.device = device
        self.batch_size = batch_size
        self.notes: list[str] = []
        self._tokenizer: Any = None
        self._ends: list[int] = []
        self._context: int | None = None

    def _take_tokenizer(self, tokenizer: Any) -> None:
        if tokenizer.chat_template is None:
            raise RequestError(
                f"the tokenizer of {shown(self.folder)} has no chat template. Give one: --chat_template_path FILE."
            )
        self._tokenizer = tokenizer

    def _batches(self, requests: Sequence[Request], prompts: list[list[int]], done: Collection[str]) -> list[list[int]]:
        """Numbers of the requests of each batch of which something is missing; the longest prompts come first."""
        order = sorted(range(len(requests)), key=lambda i: -len(prompts[i]))  # stable
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [rows for rows in batches if any(requests[i].key not in done for i in rows)]

    @abstractmethod
    def _made(self, ids: Tensor, mask: Tensor, sampler: RowSampler, limit: int) -> Tensor:
        """(B, T) at most `limit` new tokens a row; after a row's end token anything."""

    def _prompts(self, requests: Sequence[Request]) -> list[list[int]]:
        """Token ids of each request's prompt; a prompt that several share is rendered once."""
        found: dict[str, list[int]] = {}
        for request in requests:
            if request.item not in found:
                try:
                    text = render_chat(self._tokenizer, request.messages, add_generation_prompt=True)
                except RequestError:
                    raise
                except Exception as error:  # a template raises what it likes, on purpose or not
                    raise RequestError(
                        f"the chat template of {shown(self.folder)} cannot write {request.benchmark} item "
                        f"{shown(request.item)}: {shown(first_line(error))}. Give another: --chat_template_path FILE."
                    ) from error
                found[request.item] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [found[request.item] for request in requests]

    def _answer(self, requests: list[Request], prompts: list[list[int]]) -> list[Answer]:
        width = max(map(len, prompts))
        limit = self._limit(requests[0], width)
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        sampler = RowSampler([request.seed for request in requests], requests[0].sampling)
        try:
            with exact_small_products() if ids.device.type == "cpu" else contextlib.nullcontext():
                made = self._made(ids, mask, sampler, limit)
        except torch.OutOfMemoryError as error:
            raise RunFailed(
                f"memory ran out with batches of {self.batch_size} samples. Set {self.batch_size_setting} lower; "
                f"{self.how_to_go_on}."
            ) from error
        return [self._read(tokens) for tokens in made.tolist()]

    def _limit(self, request: Request, width: int) -> int:
        """New tokens that may be made: what is asked for, or what the model's context leaves, which is then said."""
        wanted = request.sampling.max_tokens
        if self._context is None or width + wanted <= self._context:
            return wanted
        self.notes.append(
            f"{wanted:,} tokens were asked for, more than the model's context of {self._context:,} leaves: answers end "
            "there and count as truncated"
        )
        if width >= self._context:
            raise RequestError(
                f"{request.benchmark} item {shown(request.item)} has {width:,} tokens; the model's context holds "
                f"{self._context:,}. Take a model with a longer context, or leave the benchmark out."
            )
        return self._context - width

    def _read(self, tokens: list[int]) -> Answer:
        end = next((i for i, token in enumerate(tokens) if token in self._ends), None)
        kept = tokens if end is None else tokens[: end + 1]
        text = str(self._tokenizer.decode(kept, skip_special_tokens=True))
        return Answer(text, "length" if end is None else "stop", len(kept))
