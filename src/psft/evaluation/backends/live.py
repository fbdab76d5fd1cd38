"""The model in memory that is being trained, by itself or by many processes, as a backend.

Batches are those of one process whatever their number, so a sample has the same neighbours; the ranks take turns at
them and give each other the answers after every batch: no rank waits for another longer than one batch takes, and a
kill costs one batch a rank. Where ranks hold parts of one model (FSDP, ZeRO-3) all of them make every call together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from psft.evaluation.backends.base import Answer, Description, Outcome, Request
from psft.evaluation.backends.batched import BatchedBackend
from psft.evaluation.backends.sampling import RowSampler
from psft.evaluation.samples import digest
from psft.models.decoding import decode, end_tokens
from psft.runs.folder import to_json

_BLOCK = 1 << 24  # elements hashed at a time
# Of a configuration: what saving, loading and training write into it.
_NOT_DECISIVE = {"_name_or_path", "transformers_version", "use_cache", "architectures", "dtype"}


class LiveBackend(BatchedBackend):
    """model, tokenizer: of the run; nothing of them is changed. numerics: what a sample's key says of the arithmetic.

    forward: calls the model, in eval mode; every rank has one. around: a batch is decoded inside it (one autocast for
    all its calls casts weights once). is_shared: ranks hold parts of one model. is_stopped: asked on each rank after
    every batch; where one says yes, `is_stopping` is True on all, and if more batches are left, `was_stopped`.
    """

    name = "training"
    batch_size_setting = "eval_suite_batch_size"
    how_to_go_on = "the last complete checkpoint is as it was: go on with --resume"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        numerics: str,
        device: torch.device,
        batch_size: int,
        forward: Callable[..., Any],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        is_shared: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
        is_stopped: Callable[[], bool] = bool,
    ) -> None:
        super().__init__(str(model.config._name_or_path or "the model"), device=str(device), batch_size=batch_size)
        self._take_tokenizer(tokenizer)
        self._ends = end_tokens(model, tokenizer)
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._numerics = numerics
        self._forward = forward
        self._around = around
        self._is_shared = is_shared and num_ranks > 1
        self._rank = rank
        self._num_ranks = num_ranks
        self._is_stopped = is_stopped
        self.is_stopping = self.was_stopped = False

    @property
    def numerics(self) -> str:
        return self._numerics

    def describe(self) -> Description:
        settings = {
            "numerics": self._numerics, "device": self.device, "batch_size": self.batch_size,
            "num_processes": self._num_ranks,
        }  # fmt: skip
        return Description(self.name, settings, list(dict.fromkeys(self.notes)))

    def close(self) -> None:
        """Nothing is held."""

    def check(self, requests: Sequence[Request]) -> None:
        """Find out before anything is generated whether every prompt can be written and fits the model.

        Raises:
            RequestError: one that cannot, by name.
        """
        for request, prompt in zip(requests, self._prompts(requests), strict=True):
            self._limit(request, len(prompt))

    def generate(self, requests: Sequence[Request], done: Collection[str]) -> Iterator[list[Outcome]]:
        """See `Backend.generate`. Every rank calls it and is given every answer; `done` of the first rank counts.

        Raises:
            RunFailed: memory ran out.
        """
        done = self._of_first(set(done))
        prompts = self._prompts(requests)
        batches = self._batches(requests, prompts, done)
        for start in range(0, len(batches), self._num_ranks):
            if self.is_stopping:
                self.was_stopped = True
                return
            share = batches[start : start + self._num_ranks]
            has_own = self._rank < len(share)
            mine: list[tuple[int, Answer]] = []
            if has_own or self._is_shared:
                rows = share[self._rank if has_own else 0]  # who has none of its own keeps step with another's
                answers = self._answer([requests[i] for i in rows], [prompts[i] for i in rows])
                mine = list(zip(rows, answers, strict=True)) if has_own else []
            theirs = self._gathered((mine, self._is_stopped()))
            yield [(requests[i], answer) for answers, _ in theirs for i, answer in answers]
            self.is_stopping |= any(is_stopped for _, is_stopped in theirs)

    def _made(self, ids: Tensor, mask: Tensor, sampler: RowSampler, limit: int) -> Tensor:
        with self._around():
            return decode(
                self._forward, ids, mask, lambda logits: sampler.draw(logits.float()), max_new_tokens=limit,
                end_ids=self._ends, is_over=self._all_are_over if self._is_shared else bool,
            )  # fmt: skip

    def _all_are_over(self, is_over: bool) -> bool:
        flag = torch.tensor(int(is_over), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag)

    def _of_first(self, value: Any) -> Any:
        return value if self._num_ranks == 1 else broadcast_object_list([value])[0]

    def _gathered(self, value: Any) -> list[Any]:
        return [value] if self._num_ranks == 1 else list(gather_object([value]))


def live_identity(model: nn.Module, tokenizer: Any, *, num_ranks: int, is_shared: bool) -> str:
    """What the answers of a model in memory follow from, 64 hex digits: every weight, its configuration, the tokenizer.

    So samples of a step are taken for those of a run that comes to this step again only if it has the same weights, to
    the bit. Cut up among ranks, the identity depends on the cut. Every rank calls it and is given the same.
    """
    with ThreadPoolExecutor(max_workers=4) as threads:  # hashlib works outside the interpreter's lock
        names, tensors = zip(*((name, _local(parameter)) for name, parameter in model.named_parameters()), strict=True)
        sums = dict(zip(names, threads.map(_sha256, tensors), strict=True))
    weights = gather_object([sums]) if is_shared and num_ranks > 1 else [sums]
    config: Any = model.config
    settings = {name: value for name, value in config.get_text_config().to_dict().items() if name not in _NOT_DECISIVE}
    words = digest([tokenizer.chat_template, sorted(tokenizer.get_vocab().items())])
    found = digest([weights, to_json(settings), words])
    return str(broadcast_object_list([found])[0]) if num_ranks > 1 else found


def _local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    part = getattr(parameter, "ds_tensor", None)  # DeepSpeed ZeRO-3
    return (parameter if part is None else part).detach()


def _sha256(tensor: Tensor) -> str:
    found = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    for block in tensor.reshape(-1).split(_BLOCK):
        found.update(block.contiguous().cpu().view(torch.uint8).numpy())
    return found.hexdigest()
