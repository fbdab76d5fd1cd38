"""Every psft setting beside those of `trl.SFTConfig`, as plain dataclasses. Imports no torch, so commands start fast.

`PSFTConfig` (in `psft.trainers`) is `PSFTFields` on top of `trl.SFTConfig`; the command line adds where data and
model come from. YAML keys, flags and Python arguments all spell these names.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class DataArguments:
    """Where the demonstrations come from and how a row becomes a training sequence."""

    dataset: str | None = _setting(
        None,
        "Demonstrations: hub id, .jsonl(.gz)/.json/.parquet/.csv file, save_to_disk folder, or reasoning-gym:TASK.",
    )
    dataset_config: str | None = _setting(None, "Configuration name of a hub data set.")
    dataset_split: str = _setting("train", "Split of a hub data set or save_to_disk folder.")
    eval_dataset: list[str] | None = _setting(None, "Held-out data, each as SOURCE or NAME=SOURCE; may be repeated.")
    eval_split: str = _setting("test", "Split of hub data sets given as eval_dataset.")
    dataset_format: str = _setting("auto", "Row format; auto recognises it from the fields and says which it found.")
    columns: dict[str, str] | None = _setting(
        None, "Field names of your data, as role=column, e.g. question=q,answer=a."
    )
    system_prompt: str | None = _setting(None, "System prompt put before every conversation that has none.")
    on_bad_row: str = _setting(
        "error", "error: stop and list the first ten bad rows; skip: leave them out, each recorded."
    )
    max_rows: int | None = _setting(None, "Use only the first N rows.")
    data_cache: bool = _setting(True, "Keep prepared data for the next run, and use what an earlier one has kept.")
    data_cache_dir: str | None = _setting(None, "Where prepared data are kept. Default: psft's cache.")


@dataclass(kw_only=True)
class ModelArguments:
    """Which model is trained and in what form."""

    model_name_or_path: str | None = _setting(
        None, "Hub id, local folder, or smollm2-135m-instruct (bundled quick start)."
    )
    model_revision: str = _setting("main", "Revision of a hub model.")
    dtype: str = _setting("float32", "Weights: float32 (bf16 autocast computes) or bfloat16 (needs force_pure_bf16).")
    attn_implementation: str | None = _setting(
        None,
        "Attention of transformers: sdpa, flash_attention_2, flash_attention_3, flex_attention, a kernel from the hub "
        "(kernels-community/...), or psft_varlen. Default: sdpa; with padding_free on CUDA the best that is installed.",
    )
    use_peft: bool = _setting(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = _setting(16, "LoRA rank.")
    lora_alpha: int = _setting(32, "LoRA scale numerator: the update is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = _setting(0.0, "LoRA dropout; PSFT requires 0, see docs.")
    lora_target_modules: list[str] | None = _setting(
        None, "Module names that get an adapter; default: all linear layers."
    )


@dataclass(kw_only=True)
class LaunchArguments:
    """How many processes train together."""

    num_processes: int | None = _setting(
        None, "Processes that train together, one a device. Default: one; with accelerate, one for each device found."
    )
    accelerate: str | None = _setting(
        None,
        "How they share the model: ddp (a copy each, the default), fsdp2, zero2 or zero3 (cut up between them), or an "
        "accelerate configuration FILE.yaml.",
    )


@dataclass(kw_only=True)
class PlanArguments:
    """What is planned."""

    stage: str = _setting("train", "The command that is planned: train, dpo or grpo. A recipe says it by itself.")


@dataclass(kw_only=True)
class ObjectiveFields:
    """Settings of the objectives. None = the objective's own default; one it does not take is refused."""

    epsilon_high: float | None = _setting(
        None, "psft: the ratio is clipped at 1 + epsilon_high; inf switches clipping off. Default 0.28."
    )
    tv_delta: float | None = _setting(
        None, "psft_tv: a token gives no gradient once its probability has grown by more than this. Default 0.2."
    )
    soft_form: str | None = _setting(None, "psft_soft: sapo (sigmoid, default) or pspo (smoothed probabilities).")
    soft_temperature: float | None = _setting(None, "psft_soft sapo: steepness of the soft clip. Default 1.")
    soft_alpha: float | None = _setting(None, "psft_soft pspo: share of the old policy mixed in. Default 0.1.")
    kl_coef: float | None = _setting(
        None, "sft_kl, asft: weight of the KL to the frozen reference. Default 0.5 (sft_kl), 0.1 (asft)."
    )
    kl_direction: str | None = _setting(
        None, "sft_kl, asft: forward = KL(reference || policy), the default; reverse = KL(policy || reference)."
    )
    kl_estimator: str | None = _setting(
        None, "sft_kl: full = exact over the vocabulary (default), or k1, k2, k3 on the target token alone."
    )
    iw_level: str | None = _setting(None, "iw_sft: one importance weight a sequence (default) or a token.")
    iw_temperature: float | None = _setting(None, "iw_sft sequence: factor on the mean log-ratio. Default 1.")
    gem_beta: float | None = _setting(None, "gem: temperature of the model's own distribution. Default 0.7.")
    gem_weighting: str | None = _setting(None, "gem: linear (default) or logsigmoid.")
    eaft_top_k: int | None = _setting(None, "eaft: how many logits the entropy is taken over. Default 20.")
    eaft_alpha: float | None = _setting(None, "eaft: exponent of the entropy weight. Default 1.")
    eaft_scaling: str | None = _setting(
        None, "eaft: entropy divided by ln(eaft_top_k) (paper, default), by 3 (llama_factory), by nothing (axolotl)."
    )


@dataclass(kw_only=True)
class BenchmarkFields:
    """Benchmarks while training, and the best checkpoint by them"""

    eval_suite: list[str] | None = _setting(
        None,
        "Benchmarks to evaluate while training: suites (math, ood, smoke), single ones (aime24, arc_c, ...) or YAML "
        "files of your own. At step 0, at the last step, and in between as eval_suite_steps says.",
    )
    eval_suite_steps: int | None = _setting(
        None, "Optimizer steps between these evaluations. Default: whenever a checkpoint is saved."
    )
    eval_suite_limit: int | None = _setting(None, "Only the first items of each benchmark.")
    eval_suite_k: int | None = _setting(None, "Samples per item (avg@k), instead of the suite's.")
    eval_suite_max_new_tokens: int | None = _setting(
        None, "Longest answer in tokens, instead of the suite's (paper: 10240)."
    )
    eval_suite_temperature: float | None = _setting(None, "Instead of the suite's (paper: 0.7); 0 = greedy.")
    eval_suite_data_dir: str | None = _setting(
        None, "Folder with the benchmark files; default: the variable PSFT_DATA_DIR."
    )
    eval_suite_download: bool = _setting(False, "Fetch sets that are not in that folder from the Hugging Face hub.")
    eval_suite_batch_size: int = _setting(16, "Samples that each process generates at a time.")
    select_best: str | None = _setting(
        None,
        "Keep the checkpoint with the highest score and link it as best: a suite or benchmark of eval_suite, or mean "
        "(of all of them).",
    )


@dataclass(kw_only=True)
class RunFields:
    """Any run: the retention probe, rules, resuming, and what is done about faults."""

    probe_every: int = _setting(
        50, "Optimizer steps between measurements of the retention probe, besides the first and the last; 0 = no probe."
    )
    probe_prompts: str | None = _setting(
        None, "File with prompts of your own for the retention probe: rows with prompt or messages, and kind."
    )
    probe_max_new_tokens: int = _setting(48, "Longest answer of the base model to a probe prompt, in tokens.")
    drift_budget: float | None = _setting(
        0.1, "Say so once the retention probe has drifted by more than this, in nats per token, beyond its error."
    )
    stop_when: list[str] | None = _setting(
        None, "Rules that end the run with a checkpoint, as METRIC>NUMBER or METRIC<NUMBER [for N]: drift>0.05."
    )
    save_when: list[str] | None = _setting(None, "Rules, written alike, that save a checkpoint and go on.")
    force_pure_bf16: bool = _setting(False, "Allow bfloat16 weights although updates at lr 1e-6 vanish in them.")
    resume: bool = _setting(
        False, "Go on with the run in output_dir from its newest complete checkpoint; begin it if there is none."
    )
    allow_changed: list[str] | None = _setting(
        None,
        "What may differ from the checkpoint a run is resumed from: data, objective, batch_sizes, world_size, seed. "
        "psft train then goes on at the next window boundary, the stages after it at the next step.",
    )
    deterministic: bool | None = _setting(
        None, "Use only kernels that give the same bits every time. Default: on a CPU, where it costs nothing."
    )
    num_threads: int | str | None = _setting(
        None,
        "Threads of one process on the CPU: a number, or auto: its physical cores, or OMP_NUM_THREADS. Default: auto "
        "on the command line; from Python the process is left as it is.",
    )
    matmul_precision: str | None = _setting(
        None,
        "float32 products: highest, high, medium as torch names them, or auto: the fastest that is exact, on a CPU. "
        "Default: auto on the command line; from Python the process is left as it is.",
    )
    max_bad_steps: int = _setting(
        3, "Steps in a row with a loss or gradient that is not finite; each is passed over, this many stop the run."
    )
    allow_pickle: bool = _setting(
        False, "Load weights that exist only as pickles (.bin), which can hold code; else safetensors alone are read."
    )
    overwrite_output_dir: bool = _setting(False, "Replace the run that output_dir holds.")


@dataclass(kw_only=True)
class PSFTFields(ObjectiveFields, BenchmarkFields, RunFields):
    """What PSFT adds to `trl.SFTConfig`. Batch sizes count sequences over all ranks."""

    objective: str = _setting(
        "psft",
        "psft, psft_tv, psft_soft, sft, sft_kl, dft, iw_sft, gem, asft, eaft, chord_phi, or your own module:function.",
    )
    objective_settings: dict[str, Any] | None = _setting(
        None, "Settings of an objective of your own, by its parameters' names: scale=2,form=linear."
    )
    loss_aggregation: str = _setting(
        "token_mean_global",
        "token_mean_global divides by the tokens of the whole step; micro_batch_token_mean averages micro-batches as "
        "verl 0.5 does, to compare with the authors' runs: the result then depends on how a step is cut.",
    )
    ref_model_name_or_path: str | None = _setting(
        None, "Frozen reference of sft_kl, iw_sft and asft. Default: the model as it is before training."
    )
    ref_model_revision: str = _setting("main", "Revision of a reference from the hub.")
    ref_cache_dir: str | None = _setting(
        None, "Where the reference's log-probs of the training tokens are kept. Default: psft's cache."
    )
    target_clip_fraction: float | None = _setting(
        None, "Adapt the trust region until this share of tokens (mini-batches 2..K of a window) is clipped."
    )
    target_drift: float | None = _setting(
        None, "Adapt the trust region until |log ratio| over mini-batches 2..K averages this, in nats."
    )
    controller_adjusts: str | None = _setting(
        None,
        "What the controller moves: epsilon (the bound; default for target_clip_fraction) or window (mini-batches that "
        "share an old policy; default for target_drift).",
    )
    train_batch_size: int | None = _setting(None, "Window: sequences that share one old policy. Default 256.")
    mini_batch_size: int | None = _setting(None, "Sequences of one optimizer step. Default 32.")
    max_tokens_per_micro_batch: int | str = _setting(
        "auto",
        "Hard cap on padded tokens of one forward pass on one device. auto: 1024 on a CPU; on an accelerator measured "
        "before the first step, and remembered.",
    )
    head_kernel: str = _setting(
        "auto",
        "What computes log-probs from hidden states: torch, trl (TRL's kernel: Triton on CUDA; no vocabulary quantity, "
        "which gem, asft, eaft and sft_kl full need), or auto: trl on CUDA where it can, else torch.",
    )
    sft_warmup_steps: int = _setting(0, "Optimizer steps of plain SFT before PSFT starts, on the same step axis.")
    sft_warmup_mini_batch_size: int | None = _setting(None, "Mini-batch of the warm-up. Default: train_batch_size.")
    sft_warmup_learning_rate: float | None = _setting(None, "Learning rate of the warm-up. Default: learning_rate.")
    sft_warmup_optimizer_state: str | None = _setting(
        None, "After the warm-up keep the optimizer's moments (default) or reset them."
    )
    track_clipped_tokens: bool = _setting(
        True, "Count by token and epoch what the bound clips, with places in the text: clipped_tokens.parquet."
    )
    allow_ratio_noise: bool = _setting(False, "Warn instead of stop when old pass and training pass differ.")


@dataclass(kw_only=True)
class DPOFields(RunFields):
    """What psft adds to `trl.DPOConfig`. Batch sizes count pairs over all ranks."""

    train_batch_size: int | None = _setting(None, "Pairs of one optimizer step. Default 64.")
    max_tokens_per_micro_batch: int | str = _setting(
        "auto",
        "Padded tokens of one forward pass on one device, both answers of a pair counted. auto: 1024 on a CPU, 8192 "
        "on an accelerator; there a longer pair is taken alone, over a number of your own it is an error.",
    )
    chat_template_path: str | None = _setting(None, "File with a chat template, where the model brings none.")
    truncation: str = _setting(
        "keep_start",
        "What is cut off beyond max_length: keep_start = the answers' ends (TRL); llama_factory = prompt and answers "
        "in proportion, by LLaMA-Factory's rule.",
    )


@dataclass(kw_only=True)
class GRPOFields(RunFields):
    """What GRPO adds to `trl.GRPOConfig`. Batch sizes count prompts over all ranks."""

    train_batch_size: int = _setting(
        256, "Prompts whose answers share one old policy; each has num_generations answers."
    )
    mini_batch_size: int = _setting(32, "Prompts of one optimizer step.")
    rewards: dict[str, float] | None = _setting(
        None,
        "What answers are rewarded for, with weights: math=1,format=0.1. math, choice, ifeval, reasoning_gym, format, "
        "length, or your own module:function.",
    )
    reward_settings: dict[str, Any] | None = _setting(
        None, 'Settings of the rewards by name, as JSON: {"math": {"policy": "psft"}}.'
    )
    reward_time_limit: float = _setting(5.0, "Processor seconds that grading an answer may take.")
    reward_workers: int | None = _setting(
        None, "Processes that grade, on each rank. Default: the processors it may use."
    )
    on_reward_failure: str | None = _setting(
        None,
        "Where a reward raises, says NaN, hangs or returns too few numbers: stop, zero_and_count or drop_group. "
        "Default: drop_group with dynamic sampling, else zero_and_count.",
    )
    overlong_buffer: int | None = _setting(
        None,
        "Tokens below max_completion_length over which an answer loses up to overlong_weight, linearly; 0 = none. "
        "Default: a fifth of max_completion_length.",
    )
    overlong_weight: float = _setting(1.0, "What an answer of max_completion_length tokens loses.")
    dynamic_sampling: bool = _setting(
        True, "Drop groups whose answers are rewarded alike, and sample on until the batch is full."
    )
    dynamic_sampling_by: str = _setting(
        "total", "What has to differ in a group: total, the weighed sum of all rewards, or one of them by name."
    )
    reward_std_tolerance: float = _setting(
        1e-6, "Largest standard deviation of the rewards of a group that counts as alike."
    )
    max_sampling_rounds: int = _setting(
        10, "Rounds of sampling for one batch; then it is trained as full as it is, or the run ends if it is empty."
    )
    sampling_batch_size: int | None = _setting(None, "Prompts sampled in a round. Default: train_batch_size.")
    max_prompt_length: int | None = _setting(
        2048, "Longest prompt in tokens, template included; longer ones are left out and counted."
    )
    keep_duplicates: bool = _setting(False, "Keep every copy of a prompt; else the first alone is used.")
    chat_template_path: str | None = _setting(None, "File or model folder whose chat template is used instead.")
    kl_to_start: bool = _setting(
        False, "Keep a copy of the model as it began and record how far the policy is from it (kl_start_k3)."
    )


OBJECTIVE_SETTINGS = tuple(item.name for item in fields(ObjectiveFields))
"""Names of the settings that belong to objectives, each to some of them."""

SAME_SIGNAL_S = 1.0
"""A signal this soon after the first, in seconds, is the same one delivered twice: to a process group and to its
leader, or to every process of a job and once more by what started them."""

TRUNCATIONS = ("keep_start", "llama_factory")
"""What `psft dpo` cuts off beyond max_length: by TRL's rule, or by LLaMA-Factory's."""

CHANGES = ("data", "objective", "batch_sizes", "world_size", "seed")
"""What must be the same for a resumed run to go on to the same bits; `allow_changed` names exceptions."""
