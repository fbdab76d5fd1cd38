"""Optimizer steps on one NVIDIA GPU (H100 or H200): random weights of known shapes, CUDA events, allocated memory.

    python benchmarks/gpu.py                                   both shapes, with and without checkpointing
    python benchmarks/gpu.py --shape Qwen/Qwen2.5-0.5B-Instruct --checkpointing off
    python benchmarks/gpu.py --dry-run --out FOLDER            every line of it on a CPU, with shapes of no meaning

Nothing is downloaded: the sizes are those of each model's config.json (`psft.models.architectures`), weights and token
ids are random, row lengths those of GSM8K in a chat template. Weights are float32 under bfloat16 autocast. A mini-batch
of 64 rows is 13 to 14 thousand tokens, one micro-batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.arms import Setting, TrainerArm, Workbench
from benchmarks.clocks import make_clock
from benchmarks.harness import Series, Spread, ratio, results, say, write_results
from benchmarks.prologue import describe_run
from benchmarks.steps import RESULTS, WINDOWS, check_arms, quieten, short_rows, time_steps
from benchmarks.trainer_arms import (
    DFT,
    GEM,
    HF,
    HF_COMPACT,
    SFT,
    TRL_DFT,
    TRL_SFT,
    psft,
    psft_arm,
    trl_arm,
)  # fmt: skip
from benchmarks.workload import plain_tokenizer, random_model, synthetic_rows, tiny_architecture

SHAPES = ("Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.2-1B-Instruct")
_STEPS = 8  # of a block, for arms without a window
_GSM8K_MEDIAN = 202  # tokens of a row in a chat template


@dataclass(frozen=True)
class Machine:
    """Where a run takes place and how large it is. A dry run is the same calls on a CPU."""

    device: str
    clock: str
    batch_size: int
    max_tokens: int
    median_length: int
    is_dry: bool


GPU = Machine("cuda", "cuda", 64, 16384, _GSM8K_MEDIAN, is_dry=False)
DRY = Machine("cpu", "wall", 4, 256, 24, is_dry=True)


def gpu_arms(is_dry: bool) -> list[TrainerArm]:
    """Padded and padding-free, TRL and ours. Windows are trained to their end: steps are cheap here."""
    steps = 2 if is_dry else _STEPS
    windows = (1, 2, 8) if is_dry else WINDOWS
    psft_free = psft_arm("psft", window=8, steps=8, name="psft_k8_padding_free", padding_free=True)
    plain = [HF, HF_COMPACT, TRL_SFT, TRL_DFT, trl_arm("nll", padding_free=True), SFT, DFT, GEM]
    plain.append(psft_arm("sft", name="sft_padding_free", padding_free=True))
    return [*(replace(arm, steps=steps) for arm in plain), *(psft(k, steps=max(k, steps)) for k in windows), psft_free]


def attention() -> str:
    """The fastest attention installed: FlashAttention 3 or 2, else torch's own."""
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return "flash_attention_3"
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") is not None else "sdpa"


def run_shape(
    shape: str, machine: Machine, *, has_checkpointing: bool, repetitions: int, attention_name: str, folder: Path
) -> dict[str, Any]:
    """All arms on one shape. Equality is checked in float32 with torch's attention: flash kernels have no float32."""
    clock = make_clock(machine.clock)
    sizes: Any = tiny_architecture() if machine.is_dry else shape
    vocab = 512 if machine.is_dry else random_vocab(shape)
    rows = synthetic_rows(machine.batch_size * 8, vocab_size=vocab, median=machine.median_length)
    setting = Setting(machine.batch_size, "bfloat16", machine.device, has_checkpointing, machine.max_tokens)
    model = random_model(sizes, device=machine.device, attention="sdpa")
    bench = Workbench(model, plain_tokenizer(), setting, clock, folder)
    prologue = describe_run(clock, device=machine.device)
    arms = gpu_arms(machine.is_dry)
    checks = check_arms(bench, arms, short_rows(rows))
    model.set_attn_implementation(attention_name)
    series = time_steps(bench, rows, arms, repetitions=repetitions, discard=0 if machine.is_dry else 1)
    settings = {
        "model": "tiny" if machine.is_dry else shape,
        "rows": f"random ids, log-normal lengths, median {machine.median_length}",
        "batch_size": machine.batch_size,
        "dtype": "bfloat16",
        "gradient_checkpointing": has_checkpointing,
        "attention": attention_name,
        "is_dry_run": machine.is_dry,
    }
    return results(
        "gpu", prologue=prologue, settings=settings, series=series, equality=checks, ratios=gpu_ratios(series)
    )


def random_vocab(shape: str) -> int:
    """Words of a known shape."""
    from psft.models.architectures import KNOWN

    return KNOWN[shape].vocab_size


def gpu_ratios(series: Series) -> dict[str, Spread]:
    """Of time, and of the largest allocation within each repetition where the device counts it."""
    wanted = {
        "psft_over_sft": ("psft_k8", "sft"),
        "psft_over_sft_padding_free": ("psft_k8_padding_free", "sft_padding_free"),
        "sft_over_trl_sft": ("sft", "trl_sft"),
        "sft_over_trl_sft_padding_free": ("sft_padding_free", "trl_sft_padding_free"),
        "psft_over_trl_sft_padding_free": ("psft_k8_padding_free", "trl_sft_padding_free"),
        "sft_over_plain_hf": ("sft", "hf"),
    }
    found = {name: ratio(series, *pair) for name, pair in wanted.items()}
    if all("peak_bytes" in block.details for name in ("psft_k8", "hf") for block in series[name]):
        pairs = zip(series["psft_k8"], series["hf"], strict=True)
        shares = [ours.details["peak_bytes"] / plain.details["peak_bytes"] for ours, plain in pairs]
        found["peak_memory_over_plain_hf"] = Spread.of(shares)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(RESULTS), help="folder of results")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with a tiny model: tries the code")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs an NVIDIA GPU; --dry-run tries it on a CPU.", file=sys.stderr)
        return 2
    quieten()
    machine = DRY if args.dry_run else GPU
    for shape in args.shape:
        for checkpointing in args.checkpointing:
            with tempfile.TemporaryDirectory() as folder:
                content = run_shape(
                    shape,
                    machine,
                    has_checkpointing=checkpointing == "on",
                    repetitions=args.repetitions,
                    attention_name=attention() if machine.device == "cuda" else "sdpa",
                    folder=Path(folder),
                )
            prefix = "dry" if machine.is_dry else "gpu"
            name = f"{prefix}-{shape.split('/')[1]}-checkpointing-{checkpointing}.json"
            write_results(Path(args.out) / name, content)
            say(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in content["ratios"].items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
