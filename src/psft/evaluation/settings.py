"""Every setting of `psft eval`, with its default and meaning. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, help: str, *backends: str) -> Any:
    """backends: those that look at it; none named = all."""
    metadata = {"help": help, "backends": backends}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class WhatToEvaluate:
    """What to evaluate"""

    suite: list[str] = _option(
        [],
        "Suites (math, ood, smoke, alignment-tax, rl-readiness), single benchmarks (aime24, arc_c, ...), YAML files of "
        "your own, tasks of lm-evaluation-harness (alignment-tax/mmlu, harness:TASK; @N behind them: N items).",
    )
    data_dir: str | None = _option(None, "Folder with the benchmark files; default: the variable PSFT_DATA_DIR.")
    download: bool = _option(False, "Fetch sets that are not under data_dir from the Hugging Face hub.")
    skip_missing: bool = _option(False, "Go on without sets that are not there, naming them; else they are an error.")
    any_rows: bool = _option(False, "Take files that have not the number of rows the suite expects.")
    limit: int | None = _option(None, "Only the first items of each benchmark.")
    k: int | None = _option(None, "Samples per item, instead of the suite's.")
    output_dir: str | None = _option(
        None, "Folder of samples, grades and results; default: evals/MODEL, or RUN/evaluation/... for a run's model."
    )
    regrade: bool = _option(False, "Grade the samples that are there again, generate nothing.")
    contamination_against: str | None = _option(
        None,
        "Training data, as --dataset of psft train, in which each test item is looked for; scores without the hits.",
    )
    compare_to: str | None = _option(None, "Results file of another model: paired test on the items both answered.")
    run_dir: str | None = _option(None, "Run folder whose eval.jsonl gets the scores, if not the model's own.")
    step: int | None = _option(None, "Optimizer step the scores are recorded at; 0 = the model before training.")


@dataclass
class HowToSample:
    """How answers are sampled"""

    seed: int = _option(0, "Of all random numbers; each sample has a seed of its own, derived from it.")
    temperature: float | None = _option(None, "Instead of the suite's (paper: 0.7); 0 = greedy.")
    top_p: float | None = _option(None, "Instead of the suite's (paper: 0.95).")
    top_k: int | None = _option(None, "Instead of the suite's (none); 0 = no limit.")
    max_new_tokens: int | None = _option(None, "Instead of the suite's (paper: 10240, IFEval 4096).")
    backend: str = _option("hf", "hf, vllm, openai (any server that speaks its protocol), or replay.")
    batch_size: int | None = _option(
        None, "hf (16) and vllm (512): samples at a time; kept after each batch.", "hf", "vllm"
    )
    dtype: str = _option(
        "auto", "hf and vllm: float32 or bfloat16; auto: bfloat16 on an accelerator, float32 on the CPU.", "hf", "vllm"
    )
    device: str = _option("auto", "hf: cpu, cuda, cuda:1, ...; auto: the accelerator if there is one.", "hf")
    chat_template_path: str | None = _option(None, "hf: Jinja file, for a model without a chat template.", "hf")
    model_revision: str = _option("main", "hf and vllm: branch, tag or commit of a hub model.", "hf", "vllm")
    trust_remote_code: bool = _option(False, "hf and vllm: run Python code that the model folder brings.", "hf", "vllm")
    engine_options: dict[str, Any] = _option({}, "vllm: arguments of vllm.LLM, as tensor_parallel_size=4.", "vllm")
    base_url: str | None = _option(None, "openai: address of the server, as http://localhost:8000/v1.", "openai")
    api_key_env: str = _option(
        "OPENAI_API_KEY", "openai: name of the variable that holds the key, if one is needed.", "openai"
    )
    concurrency: int = _option(32, "openai: requests at a time.", "openai")
    request_timeout: float = _option(1800.0, "openai: seconds for one whole request.", "openai")
    max_retries: int = _option(8, "openai: repetitions of a request that failed, with growing pauses.", "openai")
    request_extra: dict[str, Any] = _option({}, "openai: fields added to each request, as top_k=-1.", "openai")
    replay_file: str | None = _option(
        None, "replay: file of answers, rows with benchmark, item, index, response.", "replay"
    )
