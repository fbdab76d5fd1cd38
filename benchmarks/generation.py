"""Tokens a second of evaluation's backend for models here, by batch size: `psft eval --backend hf`.

    python benchmarks/generation.py --out benchmarks/results/generation.json

Each arm answers the same requests through `HFBackend.generate` with the paper's sampling, each row with its own random
numbers, so that all arms make nearly the same tokens. Prompts have unequal lengths and answers end when they end: what
padding and rows that have ended cost is in the figure. A unit of work is one token of an answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.clocks import Clock, make_clock
from benchmarks.harness import Block, interleave, ratio, results, say, write_results
from benchmarks.prologue import describe_run, is_contended
from psft.data.probe_prompts import load_probe_prompts
from psft.evaluation.backends import Answer, Request
from psft.evaluation.backends.hf import HFBackend
from psft.evaluation.benchmarks import Sampling
from psft.models import resolve_model
from psft.models.quickstart import NAME

RESULTS = Path(__file__).resolve().parent / "results" / "generation.json"
SAMPLES_PER_PROMPT = 2


def make_requests(num_answers: int, max_tokens: int) -> list[Request]:
    """Prompts of the bundled probe set, two samples of each, spread over its kinds."""
    prompts = load_probe_prompts()
    count = -(-num_answers // SAMPLES_PER_PROMPT)
    chosen = prompts[:: max(1, len(prompts) // count)][:count]
    sampling = Sampling(max_tokens=max_tokens)
    found = [
        Request(f"{i}-{j}", "probe", str(i), j, 100 * i + j, prompt.messages, sampling)
        for i, prompt in enumerate(chosen)
        for j in range(SAMPLES_PER_PROMPT)
    ]
    return found[:num_answers]


def make_arm(backend: HFBackend, size: int, requests: Sequence[Request], clock: Clock) -> Callable[[int], Block]:
    """Answers all requests, `size` at a time."""

    def arm(repetition: int) -> Block:
        backend.batch_size = size
        start = clock.mark()
        outcomes = [outcome for batch in backend.generate(requests, ()) for outcome in batch]
        seconds = clock.seconds(start, clock.mark())
        answers = [answer for _, answer in outcomes if isinstance(answer, Answer)]
        tokens = sum(answer.num_tokens or 0 for answer in answers)
        truncated = sum(answer.finish_reason == "length" for answer in answers)
        return Block(seconds / tokens, {"answer_tokens": tokens, "truncated": truncated, "all_seconds": seconds})

    return arm


def measure(args: argparse.Namespace) -> dict[str, Any]:
    clock = make_clock(args.clock or ("cuda" if args.device == "cuda" else "wall"))
    if args.device == "cpu" and is_contended():
        say("this machine is busy: times are worth little; see --clock cpu")
    backend = HFBackend(str(resolve_model(args.model)), dtype=args.dtype, device=args.device)
    requests = make_requests(args.answers, args.max_tokens)
    sizes = sorted({1, *args.batch_sizes})
    arms = {f"batch_{size}": make_arm(backend, size, requests, clock) for size in sizes}
    list(backend.generate(make_requests(2, 4), ()))  # loads
    series = interleave(arms, repetitions=args.repetitions, discard=args.discard, say=say)
    return results(
        "generation",
        prologue=describe_run(clock, device=args.device),
        settings={
            "model": Path(args.model).name, "dtype": args.dtype, "device": args.device,
            "answers": len(requests), "max_tokens": args.max_tokens, "batch_sizes": sizes,
        },
        series=series,
        ratios={f"batch_{size}_over_one": ratio(series, "batch_1", f"batch_{size}") for size in sizes[1:]},
        more={"is_contended": is_contended()},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--model", default=NAME, help="folder or hub id")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16], help="beside 1")
    parser.add_argument("--answers", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--discard", type=int, default=1, help="repetitions at the start that are not kept")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu", "cuda"), help="default: wall, on CUDA its events")
    args = parser.parse_args(argv)
    content = measure(args)
    write_results(args.out, content)
    say(", ".join(f"{name} {value:.2f}" for name, value in content["ratios"].items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
