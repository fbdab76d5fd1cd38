"""What the files of a run folder hold, one TypedDict a file.

Every field may be absent; a number that is NaN or infinite is null.
"""

from __future__ import annotations

from typing import Any, TypedDict


class MetricsRow(TypedDict, total=False):
    """One optimizer step, a line of metrics.jsonl. Fractions and means are over its counted tokens, all ranks.

    Objectives with a KL to a reference add one more, named by direction and estimator: `kl_ref_forward_full`,
    `kl_ref_reverse_k3`, ... (nats; only the full one is a KL, the others are the penalty on the target token).
    """

    step: int
    """Optimizer step, 1 is the first; warm-up steps count on the same axis."""
    stage: str
    """`warmup` (plain SFT before PSFT) or `train`."""
    window: int
    """Which window of sequences sharing one old policy, 0 is the first."""
    mini_batch: int
    """Position inside the window, 1..K; at 1 the ratio is exactly 1."""
    num_mini_batches: int
    """K, the steps of this window."""
    epsilon_high: float | None
    """Bound in force: the ratio is clipped at 1 + this. Absent where the objective has none, and in the warm-up."""
    tv_delta: float | None
    """Bound in force of psft_tv, on the growth of a probability."""
    epoch: float
    """Passes over the data, fractional."""
    tokens: int
    """Counted target tokens of this step, all ranks."""
    loss: float | None
    """What was minimised; for PSFT about -1, so read `nll`."""
    nll: float | None
    """Mean negative log-likelihood of the counted tokens, nats."""
    entropy: float | None
    """Mean entropy of the policy at the counted tokens, nats."""
    pairs: int
    """DPO: pairs of this step, all ranks; `tokens` counts those of both answers."""
    rewards_chosen: float | None
    """DPO: mean over pairs of beta x (log-prob of the chosen answer, policy minus reference), nats."""
    rewards_rejected: float | None
    """DPO: the same of the rejected answer."""
    rewards_margin: float | None
    """DPO: mean of chosen minus rejected reward."""
    rewards_accuracy: float | None
    """DPO: share of pairs whose chosen reward is the larger; says nothing at the first step, where both are 0 up to
    rounding."""
    logps_chosen: float | None
    """DPO: mean over pairs of the chosen answer's summed log-prob, nats."""
    logps_rejected: float | None
    """DPO: the same of the rejected answer."""
    reward_mean: float | None
    """GRPO: mean reward of all that was sampled for the batch, dropped groups included; in the row of its first step."""
    reward_std: float | None
    """GRPO: standard deviation of those rewards."""
    kept_group_share: float | None
    """GRPO: share of the sampled prompts whose answers were rewarded unlike."""
    sampling_rounds: int
    """GRPO: rounds of sampling the batch took; 0 if enough groups were carried over."""
    groups_sampled: int
    """GRPO: prompts sampled for the batch."""
    groups_trained: int
    """GRPO: prompts whose answers the batch holds; fewer than train_batch_size where the rounds ran out."""
    groups_carried_over: int
    """GRPO: good groups left for the next batch."""
    reward_failures: int
    """GRPO: answers for which a reward failed, since the last row (`reward_failures.jsonl`)."""
    completion_length_mean: float | None
    """GRPO: tokens of a sampled answer, mean; also `_min` and `_max`."""
    truncated_share: float | None
    """GRPO: share of the sampled answers that ended at max_completion_length."""
    clip_fraction_low: float | None
    """GRPO: share of tokens clipped at the lower bound (worse answers)."""
    clip_fraction_high: float | None
    """GRPO: share of tokens clipped at the upper bound (better answers)."""
    kl_start_k3: float | None
    """GRPO with kl_to_start: KL(policy || the model as it began) per token of the sampled answers, nats, estimator k3."""
    mean_token_accuracy: float | None
    """Share of counted tokens (DPO: of chosen answers) that the policy finds likeliest."""
    clip_fraction: float | None
    """Share of counted tokens whose gradient the clip removed."""
    clippable_fraction: float | None
    """Share of counted tokens that the bound can clip at all: old probability below 1 / (1 + epsilon_high)."""
    token_weight: float | None
    """Mean coefficient on the gradient of log p; SFT's is 1. Absent for sft, gem and full-vocabulary sft_kl."""
    log_ratio_mean: float | None
    """Mean of logps - old_logps, nats."""
    log_ratio_abs_mean: float | None
    """Mean of |logps - old_logps|, nats: how far the window has moved."""
    log_ratio_abs_max: float | None
    """Largest |logps - old_logps|, nats."""
    log_ratio_histogram: list[int] | None
    """Counted tokens by log ratio: bin i holds what lies between `LOG_RATIO_EDGES[i - 1]` and `[i]`, the first and the
    last bin what lies beyond."""
    gradient_kept: float | None
    """Share of the ratios' sum that belongs to tokens whose gradient the clip left: 1 where nothing is clipped."""
    grad_norm: float | None
    """Norm of the gradient before clipping."""
    learning_rate: float
    """The rate this step used."""
    tokens_per_second: float | None
    """Counted target tokens over wall time of the step, old pass included."""
    peak_memory_bytes: int | None
    """Largest memory held so far by this process on its device; null where it cannot be told."""


LOG_RATIO_EDGES = tuple(
    sign * edge
    for sign, edges in ((-1.0, (2.0, 1.0, 0.5, 0.25, 0.1, 0.03, 0.01)), (1.0, (0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0)))
    for edge in edges
)
"""Edges of `log_ratio_histogram` in nats, rising; ln 1.28 = 0.247 lies at one of them."""


class ProbeRow(TypedDict, total=False):
    """One group of probe prompts at one step, a line of probe.jsonl."""

    step: int
    """Optimizer steps done before the measurement; 0 is the untrained model."""
    group: str
    """The prompts' kind, or `all`."""
    drift_nats_per_token: float | None
    """Mean of base log-prob minus current log-prob over the base model's own answers: estimates KL(base || current)."""
    stderr: float | None
    """Its standard error, answers as clusters."""
    entropy: float | None
    """Mean entropy of the current model at those tokens, nats."""
    tokens: int
    """Answer tokens measured."""
    prompts: int
    """Prompts whose answers they are."""


class ClippedTokenRow(TypedDict, total=False):
    """One token of the vocabulary in one epoch, a row of clipped_tokens.parquet."""

    epoch: int
    """1 is the first pass over the data."""
    token_id: int
    token: str
    """Its text; bytes that are no text of their own as the tokenizer writes them."""
    clipped: int
    """How often the clip removed its gradient as a target."""
    seen: int
    """How often it was a counted target under a ratio that can be clipped: mini-batches 2..K."""
    contexts: list[str]
    """Up to three places where it was clipped, as text around it, the token between U+27E6 and U+27E7 brackets."""


class EvalRow(TypedDict, total=False):
    """One measured value, a line of eval.jsonl."""

    step: int
    """Optimizer steps done before the measurement; 0 is the untrained model."""
    benchmark: str
    """Name of the data set or benchmark."""
    metric: str
    """What was measured, e.g. `nll` (nats per token), `entropy` (nats), `accuracy` (0..1)."""
    k: int | None
    """Answers per question; null where nothing was sampled."""
    value: float | None
    stderr: float | None
    """Standard error of value, same unit."""
    n: int
    """Items measured: rows for a benchmark, tokens for nll and entropy."""


class RejectedRow(TypedDict, total=False):
    """One row of the data that was not used, a line of rejected.jsonl."""

    file: str
    """The file or data set the row is in."""
    line: int
    """Counts from 1: the line of a .jsonl or .csv file, the record's number for every other source."""
    reason: str
    """What makes it unusable."""
    row: str
    """How the row begins."""


class RunInfo(TypedDict, total=False):
    """run.json: how the run was made."""

    command: list[str]
    started_at: str
    """UTC, ISO 8601."""
    seed: int
    objective: dict[str, Any]
    """Its name and settings."""
    config: dict[str, Any]
    """Every setting, defaults resolved."""
    warmup: dict[str, Any] | None
    """The plain-SFT stage: steps, mini_batch_size, learning_rate, optimizer_state (`keep` or `reset`); null without."""
    num_train_rows: int
    world_size: int
    """Processes that trained together."""
    distributed_type: str
    """How they shared the model, in accelerate's words: NO, MULTI_GPU or MULTI_CPU (DDP), FSDP, DEEPSPEED."""
    deterministic: bool
    """Whether only kernels that give the same bits every time were used."""
    bad_steps: list[dict[str, Any]]
    """Steps that were passed over because loss or gradient was not finite: step, loss, grad_norm, rows."""
    alerts: list[dict[str, Any]]
    """What was said about the run while it went on: step, name, message (`psft.runs.alerts`)."""
    resumed: list[dict[str, Any]]
    """One entry each time the run was taken up again: the step, when, the command, the number of processes."""
    environment: dict[str, Any]
    """What `describe_environment` returns."""


class Summary(TypedDict, total=False):
    """summary.json: how the run went."""

    exit_reason: str
    """`finished`, `interrupted` or `failed: ...`."""
    steps: int
    wall_time_s: float
    first: dict[str, Any]
    """First, last and best of the measured values."""
    last: dict[str, Any]
    best: dict[str, Any]
    best_checkpoint: dict[str, Any] | None
    """With select_best: step of the checkpoint that RUN/best leads to, what it was chosen by, and its score."""
