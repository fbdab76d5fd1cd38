"""vLLM's offline engine: the samples of one prompt are one request with n, so its prompt is read once.

vLLM is not a dependency: its builds go with a CUDA version. Its answers depend on what else is in a batch (kernels
differ by size), so a resumed evaluation has valid samples, none twice, but not the same bits as an uninterrupted one.
The n answers of a request come and are kept together.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from psft.errors import RequestError, first_line, shown
from psft.evaluation.backends.base import Answer, Description, Failure, Outcome, Request

INSTALL = (
    "--backend vllm needs vLLM, which is not installed. Install the build for your CUDA version (docs.vllm.ai, section "
    "Installation), or use --backend hf, or start `vllm serve` elsewhere and use --backend openai --base_url URL."
)
_NEUTRAL = frozenset(
    {
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization", "swap_space",
        "cpu_offload_gb", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "enable_prefix_caching",
        "enable_chunked_prefill", "disable_log_stats", "trust_remote_code",
    }
)  # fmt: skip
"""Engine options that say how the work is done, not what comes out: another card must not make samples anew."""


class VLLMBackend:
    """folder: of the model. options: further arguments of `vllm.LLM`, as {"tensor_parallel_size": 4}.

    batch_size: samples handed over at a time; they are kept when the whole batch is done.
    """

    name = "vllm"

    def __init__(
        self, folder: str, *, dtype: str = "auto", batch_size: int = 512, options: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.batch_size = batch_size
        self.options = dict(options or {})
        self._engine: Any = None

    @property
    def numerics(self) -> str:
        options = {name: value for name, value in self.options.items() if name not in _NEUTRAL}
        return f"vllm/{self.dtype}" + (json.dumps(options, sort_keys=True, default=str) if options else "")

    def describe(self) -> Description:
        notes = ["answers depend on the batch in the last bits of the arithmetic"]
        return Description(self.name, {"dtype": self.dtype, "options": self.options}, notes)

    def generate(self, requests: Sequence[Request], done: Collection[str]) -> Iterator[list[Outcome]]:
        """See `Backend.generate`.

        Raises:
            RequestError: vLLM is not installed, or cannot load the model.
        """
        todo = [request for request in requests if request.key not in done]
        groups = [list(group) for _, group in groupby(todo, key=lambda request: request.item)]
        while groups:
            part = [groups.pop(0)]
            while groups and sum(map(len, part)) + len(groups[0]) <= self.batch_size:
                part.append(groups.pop(0))
            vllm = _import()
            engine = self._load(vllm)
            try:
                outputs = engine.chat(
                    [list(group[0].messages) for group in part],
                    [_parameters(vllm, group) for group in part],
                    use_tqdm=False,
                )
            except ValueError as error:  # a prompt beyond the model's context, a template that refuses the messages
                raise RequestError(
                    f"vLLM refuses a prompt of {part[0][0].benchmark}: {shown(first_line(error))}. Change "
                    "--engine_options, or leave the benchmark out."
                ) from error
            yield [pair for group, output in zip(part, outputs, strict=True) for pair in _outcomes(group, output)]

    def _load(self, vllm: Any) -> Any:
        if self._engine is None:
            settings: dict[str, Any] = {
                "model": self.folder,
                "dtype": self.dtype,
                "generation_config": "vllm",  # nothing from the model's generation_config.json beyond what is asked
                "enable_prefix_caching": True,
            }
            try:
                self._engine = vllm.LLM(**{**settings, **self.options})
            except (ValueError, TypeError, RuntimeError) as error:
                raise RequestError(
                    f"vLLM cannot load {shown(self.folder)}: {shown(first_line(error))}. Change --engine_options or "
                    "the model, or use --backend hf."
                ) from error
        return self._engine

    def close(self) -> None:
        self._engine = None


def _parameters(vllm: Any, group: list[Request]) -> Any:
    """vLLM gives the i-th of n answers the seed plus i."""
    sampling = group[0].sampling
    return vllm.SamplingParams(
        n=len(group),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        max_tokens=sampling.max_tokens,
        seed=group[0].seed,
    )


def _outcomes(group: list[Request], output: Any) -> Iterator[Outcome]:
    answers = list(output.outputs)
    for i, request in enumerate(group):
        reason = answers[i].finish_reason if i < len(answers) else "fewer answers than asked for"
        if reason in ("stop", "length"):
            yield request, Answer(answers[i].text, reason, len(answers[i].token_ids))
        else:
            yield request, Failure(f"vLLM: {reason}")


def _import() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise RequestError(INSTALL) from error
    return vllm
