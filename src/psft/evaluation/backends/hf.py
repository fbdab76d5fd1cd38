"""transformers' `generate` on this machine, CPU too: batched, left-padded, sorted by length.

A resumed evaluation gives the samples of an uninterrupted one, to the bit on the same machine. Two things make it so:
batches are cut over all requests of a benchmark, done or not, so a sample always has the same neighbours and the same
padding; and each row draws with random numbers of its own (`RowSampler`). A batch of which something is missing is run
whole, so a kill costs one batch of work. Another batch size or limit cuts other batches: rounding may then turn a
token, and both samples are valid ones of the same model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from psft.data.templates import render_chat
from psft.errors import RequestError, RunFailed, first_line, shown
from psft.evaluation.backends.base import Answer, Description, Outcome, Request
from psft.evaluation.backends.sampling import RowSampler
from psft.evaluation.identity import template_hash
from psft.models import load_model, load_tokenizer
from psft.ops.precision import exact_small_products


class HFBackend:
    """folder: of the model. dtype: float32 or bfloat16. device: as torch names it. batch_size: samples at a time."""

    name = "hf"

    def __init__(
        self,
        folder: str,
        *,
        dtype: str,
        device: str,
        batch_size: int = 16,
        chat_template_path: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self.batch_size = batch_size
        self.chat_template_path = chat_template_path
        self.trust_remote_code = trust_remote_code
        self.notes: list[str] = []
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def numerics(self) -> str:
        """A template that the model's folder does not hold decides the prompt, and is in no other part of the key."""
        if self.chat_template_path is None:
            return f"hf/{self.dtype}"
        return f"hf/{self.dtype}/{template_hash(Path(self.chat_template_path).expanduser())[:16]}"

    def describe(self) -> Description:
        settings = {"dtype": self.dtype, "device": self.device, "batch_size": self.batch_size}
        return Description(self.name, settings, list(dict.fromkeys(self.notes)))

    def close(self) -> None:
        self._model = None

    def generate(self, requests: Sequence[Request], done: Collection[str]) -> Iterator[list[Outcome]]:
        """See `Backend.generate`.

        Raises:
            RequestError: the model cannot be loaded, or its chat template cannot write these messages.
            RunFailed: memory ran out.
        """
        if all(request.key in done for request in requests):
            return
        self._load()
        prompts = self._prompts(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(prompts[i]))  # stable; the largest batch comes first
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            if any(requests[i].key not in done for i in rows):
                answers = self._answer([requests[i] for i in rows], [prompts[i] for i in rows])
                yield [(requests[i], answer) for i, answer in zip(rows, answers, strict=True)]

    def _load(self) -> None:
        if self._model is not None:
            return
        self._tokenizer = load_tokenizer(self.folder, self.chat_template_path, trust_remote_code=self.trust_remote_code)
        if self._tokenizer.chat_template is None:
            raise RequestError(
                f"the tokenizer of {shown(self.folder)} has no chat template. Give one: --chat_template_path FILE."
            )
        model: Any = load_model(
            self.folder, dtype=self.dtype, force_pure_bf16=True, trust_remote_code=self.trust_remote_code
        )
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self._ends = sorted({*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id} - {None})
        # Without this, repetition_penalty and the like of the model's generation_config.json act on what is sampled.
        model.generation_config = GenerationConfig(
            eos_token_id=self._ends, pad_token_id=self._tokenizer.pad_token_id, do_sample=False
        )
        try:
            self._model = model.to(self.device).eval()
        except torch.OutOfMemoryError as error:
            raise RunFailed(f"the model does not fit into the memory of {self.device}.") from error
        except (RuntimeError, AssertionError) as error:  # torch built without it, or no such number
            raise RequestError(
                f"--device {shown(self.device)} cannot be used: {shown(first_line(error))}. Give another, or auto."
            ) from error
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)

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
        is_cpu = self._model.device.type == "cpu"
        try:
            with torch.inference_mode(), exact_small_products() if is_cpu else contextlib.nullcontext():
                made = self._model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=limit,
                    logits_processor=LogitsProcessorList([sampler]),
                )
        except torch.OutOfMemoryError as error:
            raise RunFailed(
                f"memory ran out with batches of {self.batch_size}. Set --batch_size lower; the same command goes on "
                "from here."
            ) from error
        return [self._read(tokens) for tokens in made[:, width:].tolist()]

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


def choose_device(device: str) -> str:
    """`auto`: the accelerator torch sees, else the CPU."""
    if device != "auto":
        return device
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def choose_dtype(dtype: str, device: str) -> str:
    """`auto`: bfloat16 on an accelerator, float32 on the CPU."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"
