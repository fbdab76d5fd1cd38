"""How the ratios move with sequence length, vocabulary and trained share, on a small random model.

    python benchmarks/sweeps.py            4 layers, hidden 256; some minutes on 2 cores
    python benchmarks/sweeps.py --tiny     seconds, to try the code

One quantity is varied at a time about 1024 tokens, 49152 words and 58 % trained. A mini-batch is always 4096 tokens,
rows of one length, so that padding plays no part: what is left is attention, head and the old pass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.arms import Setting, Workbench
from benchmarks.clocks import Clock, make_clock
from benchmarks.harness import Block, Series, Spread, results, say, write_results
from benchmarks.prologue import describe_run
from benchmarks.steps import (
    ARMS,
    RESULTS,
    check_arms,
    headline_ratios,
    quieten,
    short_rows,
    time_steps,
)  # fmt: skip
from benchmarks.workload import plain_tokenizer, random_model, synthetic_rows, tiny_architecture
from psft.ops.precision import choose_cpu_matmul_precision, has_native_bf16

SWEEP_ARMS = ("trl_sft", "sft", "psft_k8")
MINI_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Point:
    """length: tokens of a row. vocab: words. trained: share of the tokens."""

    length: int = 1024
    vocab: int = 49152
    trained: float = 0.58

    @property
    def label(self) -> str:
        return f"{self.length} tokens, {self.vocab} words, {self.trained:.0%} trained"


BASE = Point()
POINTS = tuple(
    dict.fromkeys(
        [
            BASE,
            *(replace(BASE, length=n) for n in (256, 4096)),
            *(replace(BASE, vocab=n) for n in (32768, 151936, 262144)),
            *(replace(BASE, trained=share) for share in (0.2, 0.95)),
        ]
    )
)
TINY_POINTS = (Point(64, 512, 0.5), Point(128, 512, 0.5))


def run_point(
    point: Point, dtype: str, clock: Clock, folder: Path, *, repetitions: int, is_tiny: bool
) -> tuple[Series, list[dict[str, Any]]]:
    """The arms of one point, interleaved, after their equality check."""
    size = max(1, (256 if is_tiny else MINI_BATCH_TOKENS) // point.length)
    shape = tiny_architecture(point.vocab) if is_tiny else tiny_architecture(point.vocab, 256, 4)
    rows = synthetic_rows(
        size * (repetitions + 1), vocab_size=point.vocab, median=point.length, spread=0.0, trained=point.trained
    )
    setting = Setting(size, dtype, max_tokens=max(1024, point.length))
    bench = Workbench(random_model(shape), plain_tokenizer(), setting, clock, folder)
    arms = [ARMS[name] for name in SWEEP_ARMS]
    checks = check_arms(bench, arms, short_rows(rows))
    return time_steps(bench, rows, arms, repetitions=repetitions, discard=0 if is_tiny else 1), checks


def run(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """All points; arms are named ARM at POINT in the samples."""
    prologue = describe_run(clock)
    samples: dict[str, list[Block]] = {}
    ratios: dict[str, Spread] = {}
    checks, table = [], []
    for point in TINY_POINTS if args.tiny else POINTS:
        say(point.label)
        with tempfile.TemporaryDirectory() as folder:
            series, equal = run_point(
                point, args.dtype, clock, Path(folder), repetitions=args.repetitions, is_tiny=args.tiny
            )
        samples |= {f"{name} at {point.label}": blocks for name, blocks in series.items()}
        checks += equal
        found = headline_ratios(series)
        ratios |= {f"{name} at {point.label}": spread for name, spread in found.items()}
        table.append({**asdict(point), **{name: asdict(spread) for name, spread in found.items()}})
    settings = {"dtype": args.dtype, "model": "tiny" if args.tiny else "4 layers, hidden 256, random weights"}
    return results(
        "sweeps", prologue=prologue, settings=settings, series=samples, equality=checks, ratios=ratios,
        more={"points": table},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(RESULTS), help="folder of results")
    fast = "bfloat16" if has_native_bf16() else "float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=fast)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--tiny", action="store_true", help="two points of a model of a few thousand parameters")
    args = parser.parse_args(argv)
    quieten()
    choose_cpu_matmul_precision()
    content = run(args, make_clock(args.clock))
    write_results(Path(args.out) / "sweeps.json", content)
    for name, value in content["ratios"].items():
        say(f"{value:.3f}  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
