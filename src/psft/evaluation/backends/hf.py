"""transformers' `generate` on this machine, CPU too: batched, left-padded, sorted by length.

A resumed evaluation gives the samples of an uninterrupted one, to the bit on the same machine. Two things make it so:
batches are cut over all requests of a benchmark, done or not, so a sample always has the same neighbours and the same
padding; and each row draws with random numbers of its own (`RowSampler`). A batch of which something is missing is run
whole, so a kill costs one batch of work. Another batch size or limit cuts other batches: rounding may then turn a
token, and both samples are valid ones of the same model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from psft.errors import RequestError, RunFailed, first_line, shown
from psft.evaluation.backends.base import Description, Outcome, Request
from psft.evaluation.backends.batched import BatchedBackend
from psft.evaluation.backends.sampling import RowSampler
from psft.evaluation.identity import template_hash
from psft.models import load_model, load_tokenizer
from psft.models.decoding import end_tokens


class HFBackend(BatchedBackend):
    """folder: of the model. dtype: float32 or bfloat16. device: as torch names it. batch_size: samples at a time."""

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
        super().__init__(folder, device=device, batch_size=batch_size)
        self.dtype = dtype
        self.chat_template_path = chat_template_path
        self.trust_remote_code = trust_remote_code
        self._model: Any = None

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
        for rows in self._batches(requests, prompts, done):
            answers = self._answer([requests[i] for i in rows], [prompts[i] for i in rows])
            yield [(requests[i], answer) for i, answer in zip(rows, answers, strict=True)]

    def _load(self) -> None:
        if self._model is not None:
            return
        self._take_tokenizer(
            load_tokenizer(self.folder, self.chat_template_path, trust_remote_code=self.trust_remote_code)
        )
        model: Any = load_model(
            self.folder, dtype=self.dtype, force_pure_bf16=True, trust_remote_code=self.trust_remote_code
        )
        self._ends = end_tokens(model, self._tokenizer)
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

    def _made(self, ids: Tensor, mask: Tensor, sampler: RowSampler, limit: int) -> Tensor:
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=limit,
                logits_processor=LogitsProcessorList([sampler]),
            )
        return made[:, ids.shape[1] :]


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
