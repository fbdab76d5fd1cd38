"""Settings that every configuration of psft fills in and checks alike: machine, probe, rules, resuming, faults."""

from __future__ import annotations

from typing import Any

import torch

from psft.config import CHANGES
from psft.ops.precision import has_native_bf16
from psft.trainers.compute import compute_problems
from psft.trainers.trackers import refused_trackers


def settle_machine(args: Any) -> None:
    """Before transformers fills in its own: bf16 where the hardware computes it natively, and the CPU where there is
    nothing else."""
    args.logging_nan_inf_filter = False  # a loss that is not finite is shown, and its step passed over
    if args.bf16 is None and not args.fp16:
        args.bf16 = has_native_bf16()
    if not torch.accelerator.is_available():
        args.use_cpu = True  # transformers refuses bf16 on a CPU unless told so


def settle_determinism(args: Any) -> None:
    """After transformers has found the device."""
    if args.deterministic is None:
        args.deterministic = args.device.type == "cpu"


def run_problems(args: Any) -> list[str]:
    """What is wrong with `RunFields` and trackers, each as a sentence without its full stop."""
    problems = [*compute_problems(args), *refused_trackers(args.report_to or [])]
    if args.max_bad_steps < 1:
        problems.append(f"max_bad_steps={args.max_bad_steps} must be 1 or more")
    unknown = [name for name in args.allow_changed or [] if name not in CHANGES]
    if unknown:
        problems.append(f"allow_changed={','.join(unknown)} is not known; it is any of {', '.join(CHANGES)}")
    if args.probe_every < 0:
        problems.append(f"probe_every={args.probe_every} must be 0 (no probe) or more optimizer steps")
    if args.probe_max_new_tokens < 1:
        problems.append(f"probe_max_new_tokens={args.probe_max_new_tokens} must be 1 or more")
    if args.probe_prompts is not None and not args.probe_every:
        problems.append("probe_prompts has no effect with probe_every=0. Remove one of them")
    if args.drift_budget is not None and not args.drift_budget > 0:
        problems.append(f"drift_budget={args.drift_budget} must be greater than 0 (nats per token)")
    if args.allow_changed and not (args.resume or args.resume_from_checkpoint):
        problems.append("allow_changed has no effect without resume. Remove it")
    if args.resume and args.overwrite_output_dir:
        problems.append("resume goes on with the run in output_dir and overwrite_output_dir removes it. Give one")
    return problems


def cap_problems(args: Any) -> list[str]:
    """Make `max_tokens_per_micro_batch` a number unless it is auto; what is wrong with it."""
    if args.max_tokens_per_micro_batch == "auto":
        return []
    try:
        args.max_tokens_per_micro_batch = int(args.max_tokens_per_micro_batch)
    except ValueError:
        args.max_tokens_per_micro_batch = 0
    if args.max_tokens_per_micro_batch < 1:
        return ["max_tokens_per_micro_batch must be a number of tokens or auto"]
    return []


def parallelism_problems(args: Any) -> list[str]:
    """Ways to cut up a sequence that no trainer of psft supports; `parallelism_config` as of accelerate."""
    parallelism = getattr(args, "parallelism_config", None)
    kinds = ("cp_enabled", "sp_enabled")
    if parallelism is not None and any(getattr(parallelism, kind, False) for kind in kinds):
        return ["context and sequence parallelism cut a sequence up between ranks. Set cp_size and sp_size to 1"]
    return []
