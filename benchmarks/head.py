"""The LM head alone: loss and gradients on fixed tensors, by every kernel that runs here.

    python benchmarks/head.py                              float32 and bfloat16 into benchmarks/results
    python benchmarks/head.py --dtype float32 --tokens 512 --out FOLDER

bfloat16 is what autocast makes of it: bfloat16 hidden states, float32 weight. Each arm's error against float32 stands
beside its time, since an arm may buy time with precision. Memory is measured in a process for each number of rows.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.clocks import Clock, make_clock
from benchmarks.equality import RTOL, Outcome, check_equal, describe
from benchmarks.harness import Block, Spread, interleave, ratio, results, say, write_results
from benchmarks.head_peers import PEERS, Peer
from benchmarks.memory import peak_bytes, reset_peak, resident_bytes
from benchmarks.prologue import describe_run, is_contended
from psft.ops import IGNORE_INDEX
from psft.ops.precision import choose_cpu_matmul_precision

RESULTS = Path(__file__).resolve().parent / "results"
MEMORY_ARMS = ("plain_compact", "trl_compact", "ours_differentiable", "ours")
MEMORY_TOKENS = (1024, 2048, 4096, 8192)
MOST_PLAIN_TOKENS = 4096  # its logits alone take 0.8 GB there, three times over


@dataclass(frozen=True)
class Sizes:
    """positions: of a padded batch. share: of them scored. The rest: of the model, SmolLM2-135M's by default."""

    positions: int = 2048
    share: float = 0.387  # a batch of 8 rows of GSM8K, padded: 792 of 2048
    vocab: int = 49152
    hidden: int = 576


def make_tensors(sizes: Sizes, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (P, H) in `dtype`, weight (V, H) float32, labels (P,). Logits have a standard deviation of 3."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sizes.positions, sizes.hidden, generator=generator)
    weight = torch.randn(sizes.vocab, sizes.hidden, generator=generator) * (3 / math.sqrt(sizes.hidden))
    labels = torch.randint(sizes.vocab, (sizes.positions,), generator=generator)
    scored = torch.randperm(sizes.positions, generator=generator)[: max(1, round(sizes.share * sizes.positions))]
    is_scored = torch.zeros(sizes.positions, dtype=torch.bool).index_fill_(0, scored, True)
    labels = torch.where(is_scored, labels, IGNORE_INDEX)
    hidden, weight = hidden.to(device, dtype).requires_grad_(), weight.to(device).requires_grad_()
    return hidden, weight, labels.to(device)


def run_once(peer: Peer, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Loss, and gradients left on hidden and weight."""
    hidden, weight, labels = tensors
    hidden.grad = weight.grad = None
    is_half = hidden.dtype == torch.bfloat16
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=is_half):
        loss = peer.head(hidden, weight, labels)
    loss.backward()
    return loss.detach()


def outcome(peer: Peer, tensors: tuple[Tensor, Tensor, Tensor]) -> Outcome:
    """Loss (None for psft, which reports -1) and both gradients, in float32."""
    loss = float(run_once(peer, tensors))
    hidden, weight, _ = tensors
    assert hidden.grad is not None and weight.grad is not None
    gradients = {"hidden": hidden.grad.float().clone(), "weight": weight.grad.float().clone()}
    return Outcome(None if peer.name.endswith("psft") else loss, gradients)


def check_peers(peers: Sequence[Peer], sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """All peers in float32 against plain logits on a quarter of the positions. Raises ArmsDiffer."""
    small = Sizes(max(64, sizes.positions // 4), sizes.share, sizes.vocab, sizes.hidden)
    tensors = make_tensors(small, torch.float32, device)
    judge = outcome(PEERS["plain_all"], tensors)
    return [check_equal(p.name, outcome(p, tensors), "plain_all", judge, rtol=RTOL) for p in peers]


def bf16_errors(peers: Sequence[Peer], sizes: Sizes, device: str) -> dict[str, dict[str, float | None]]:
    """Errors of every peer in bfloat16 against float32 on the same rounded hidden states: recorded, not judged."""
    small = Sizes(max(64, sizes.positions // 4), sizes.share, sizes.vocab, sizes.hidden)
    half = make_tensors(small, torch.bfloat16, device)
    exact = (half[0].detach().float().requires_grad_(), half[1].detach().clone().requires_grad_(), half[2])
    judge = outcome(PEERS["plain_all"], exact)
    found = {}
    for peer in peers:
        errors = check_equal(peer.name, outcome(peer, half), "plain_all in float32", judge, rtol=1.0)
        found[peer.name] = {key: errors[key] for key in ("loss_error", "gradient_error")}
    return found


def run_dtype(args: argparse.Namespace, dtype_name: str, clock: Clock) -> dict[str, Any]:
    """Time all peers in one precision; memory too unless `--no-memory`."""
    sizes = Sizes(args.tokens, args.share, args.vocab, args.hidden)
    prologue = describe_run(clock, device=args.device)
    skipped = {name: why for name, peer in PEERS.items() if (why := peer.why_not(args.device))}
    peers = [peer for name, peer in PEERS.items() if name not in skipped]
    checks = check_peers(peers, sizes, args.device)
    say(describe(checks) + "".join(f"; no {name}: {why}" for name, why in skipped.items()))
    errors = bf16_errors(peers, sizes, args.device) if dtype_name == "bfloat16" else {}
    tensors = make_tensors(sizes, getattr(torch, dtype_name), args.device)
    real, scored = sizes.positions, int((tensors[2] != IGNORE_INDEX).sum())

    def timed(peer: Peer) -> Any:
        def block(repetition: int) -> Block:
            start = clock.mark()
            run_once(peer, tensors)
            end = clock.mark()
            return Block(clock.seconds(start, end), {"real_tokens": real, "trained_tokens": scored})

        return block

    series = interleave({p.name: timed(p) for p in peers}, repetitions=args.repetitions, say=say)
    ratios: dict[str, Spread] = {
        f"head_over_{name}": ratio(series, "ours", name)
        for name in ("trl_compact", "trl_shipped", "plain_compact", "plain_all", "torch_fused", "liger")
        if name in series
    }
    memory: list[dict[str, Any]] = []
    if not args.no_memory and args.device == "cpu":
        memory = memory_by_tokens(sizes, dtype_name, [n for n in MEMORY_ARMS if n in series], args.memory_tokens)
        beyond = [row["beyond_bytes"] for row in memory if row["arm"] == "ours"]
        ratios["head_memory_largest_over_smallest"] = Spread.of([max(beyond) / min(beyond)])
    settings = {**asdict(sizes), "dtype": dtype_name, "device": args.device, "skipped": skipped}
    return results(
        "head", prologue=prologue, settings=settings, series=series, equality=checks, ratios=ratios,
        more={"bf16_errors": errors, "memory": memory},
    )  # fmt: skip


def memory_by_tokens(
    sizes: Sizes, dtype_name: str, names: Sequence[str], tokens: Sequence[int]
) -> list[dict[str, Any]]:
    """Peak of each arm for growing numbers of scored rows, each in a fresh process."""
    found = []
    for name in names:
        for number in tokens:
            if PEERS[name].grows and number > MOST_PLAIN_TOKENS:
                continue
            command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", name, "--tokens", str(number)]
            command += ["--share", "1", "--vocab", str(sizes.vocab), "--hidden", str(sizes.hidden)]
            command += ["--dtype", dtype_name]
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
            if done.returncode:
                raise RuntimeError(f"memory of {name}: exit code {done.returncode}: {done.stderr[-2000:]}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
            say(f"memory of {name}, {number} rows: {found[-1]['beyond_bytes'] / 2**20:.0f} MiB")
    return found


def memory_of(name: str, sizes: Sizes, dtype_name: str) -> dict[str, Any]:
    """In this process: the peak of one pass above what was resident with its inputs.

    beyond_bytes: less the gradient of the hidden states, which grows with the rows whatever the head does. The weight's
    gradient is in it.
    """
    dtype = getattr(torch, dtype_name)
    warm = make_tensors(Sizes(64, 1.0, sizes.vocab, sizes.hidden), dtype, "cpu")
    run_once(PEERS[name], warm)
    tensors = make_tensors(sizes, dtype, "cpu")
    warm[0].grad = warm[1].grad = None
    before, was_reset = resident_bytes(), reset_peak()
    run_once(PEERS[name], tensors)
    peak = peak_bytes()
    hidden_gradient = tensors[0].numel() * tensors[0].element_size()
    return {
        "arm": name,
        "tokens": sizes.positions,
        "peak_bytes": peak,
        "beyond_bytes": peak - (before or 0) - hidden_gradient,
        "hidden_gradient_bytes": hidden_gradient,
        "was_reset": was_reset,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Sizes()
    parser.add_argument("--out", default=str(RESULTS), help="folder of results")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=default.positions, help="positions, scored and not")
    parser.add_argument("--share", type=float, default=default.share, help="of them that are scored")
    parser.add_argument("--vocab", type=int, default=default.vocab)
    parser.add_argument("--hidden", type=int, default=default.hidden)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu", "cuda"), help="default: wall, on CUDA its events")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument(
        "--memory-tokens", type=int, nargs="+", default=list(MEMORY_TOKENS), help="rows whose memory is measured"
    )
    parser.add_argument("--memory-of", choices=sorted(PEERS), help=argparse.SUPPRESS)  # a fresh process of this script
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    choose_cpu_matmul_precision()
    if args.memory_of:
        sizes = Sizes(args.tokens, args.share, args.vocab, args.hidden)
        print(json.dumps(memory_of(args.memory_of, sizes, args.dtype[0])))
        return 0
    clock = make_clock(args.clock or ("cuda" if args.device == "cuda" else "wall"))
    if args.device == "cpu" and is_contended():
        say("this machine is busy: times are worth little; see --clock cpu")
    for dtype_name in args.dtype:
        content = run_dtype(args, dtype_name, clock)
        suffix = "" if args.device == "cpu" else "-gpu"
        write_results(Path(args.out) / f"head-{dtype_name}{suffix}.json", content)
        say(", ".join(f"{name} {value:.3f}" for name, value in content["ratios"].items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
