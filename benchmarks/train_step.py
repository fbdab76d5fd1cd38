"""Time of an optimizer step, end to end: every trainer through its own `train()`, on the same rows and model.

    python benchmarks/train_step.py --quick --out FILE     under 3 minutes on 2 cores: the five ratios
    python benchmarks/train_step.py --suite steps          the tables of docs/performance.md, into benchmarks/results
    python benchmarks/train_step.py --suite k_sweep        whole windows for K = 1, 2, 4, 8, 16
    python benchmarks/train_step.py --suite overheads      trainer and telemetry over a bare loop of the same operations

A repetition gives every arm the same mini-batch. psft draws a window of K mini-batches, all with those rows: it scores
K - 1 of them before the first update and then trains; two of its K equal steps are taken, the rest counted at the time
of the second (`RunningArm.block`). `k_sweep` takes every step of windows with different rows, and checks that.
"""

from __future__ import annotations

import time

_STARTED = time.monotonic()  # before the imports that take seconds: they are part of what --quick may take

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks import overheads
from benchmarks.arms import Setting
from benchmarks.clocks import Clock, make_clock
from benchmarks.harness import Block, Budget, Spread, interleave, ratio, results, say, write_results
from benchmarks.memory import trim_heap
from benchmarks.prologue import describe_run, is_contended
from benchmarks.quick import run_quick
from benchmarks.steps import (
    ARMS,
    RESULTS,
    STEPS,
    WINDOWS,
    Results,
    check_arms,
    cut,
    headline_ratios,
    make_workbench,
    memory_ratio,
    quieten,
    settings_of,
    short_rows,
    time_steps,
)
from benchmarks.trainer_arms import SFT, psft

QUICK_SECONDS = 170.0


def run_steps(args: argparse.Namespace, clock: Clock, folder: Path) -> None:
    """One results file for each batch size and precision: all arms, and peak memory."""
    bench, rows, source = make_workbench(Setting(2), clock, folder, seed=args.seed, is_tiny=args.tiny)
    arms = [ARMS[name] for name in args.arms or STEPS]
    checks = check_arms(bench, arms, short_rows(rows))
    for dtype in args.dtype:
        for size in args.batch_size:
            at_once = min(size, args.rows_at_once)
            setting = Setting(size, dtype, rows_at_once=at_once)
            prologue = describe_run(clock)
            series = time_steps(
                bench.with_setting(setting), rows, arms, repetitions=args.repetitions, discard=args.discard
            )
            trim_heap()
            memory, spread = memory_ratio(size, dtype, seed=args.seed, is_tiny=args.tiny, rows_at_once=at_once)
            content = results(
                "steps",
                prologue=prologue,
                settings=settings_of(setting, source, seed=args.seed, is_tiny=args.tiny),
                series=series,
                equality=checks,
                ratios={**headline_ratios(series), "peak_memory_over_plain_hf": spread},
                more={"memory": memory},
            )
            _write(args, f"steps-{size}-{dtype}.json", content)


def run_k_sweep(args: argparse.Namespace, clock: Clock, folder: Path) -> None:
    """Every step of whole windows over the same 64 rows, cut into 16 mini-batches of 4, and sft on those."""
    setting = Setting(4, args.dtype[-1])
    bench, rows, source = make_workbench(setting, clock, folder, seed=args.seed, is_tiny=args.tiny)
    prologue = describe_run(clock)
    mini_batches = cut(rows, setting.batch_size, max(WINDOWS))
    arms = [replace(SFT, steps=len(mini_batches)), *(psft(k, steps=len(mini_batches)) for k in WINDOWS)]
    checks = check_arms(bench, arms, short_rows(rows))
    running = {arm.name: arm.on(bench) for arm in arms}

    def timed(name: str) -> Callable[[int], Block]:
        return lambda repetition: running[name].block(mini_batches)

    series = interleave(
        {name: timed(name) for name in running}, repetitions=args.repetitions, discard=args.discard, say=say
    )
    settings = settings_of(setting, source, seed=args.seed, is_tiny=args.tiny)
    content = results(
        "k_sweep",
        prologue=prologue,
        settings={**settings, "rows_of_a_block": len(mini_batches) * setting.batch_size},
        series=series,
        equality=checks,
        ratios={name: ratio(series, name, "sft") for name in series if name != "sft"},
        more={"floors": {f"psft_k{k}": 1 + (k - 1) / (3 * k) for k in WINDOWS}},
    )
    _write(args, "k_sweep.json", content)


def run_overheads(args: argparse.Namespace, clock: Clock, folder: Path) -> None:
    """What the trainer and its telemetry add to the model's operations and the optimizer."""
    setting = Setting(args.batch_size[0], args.dtype[-1])
    bench, rows, source = make_workbench(setting, clock, folder, seed=args.seed, is_tiny=args.tiny)
    prologue = describe_run(clock)
    arms = [overheads.BARE, overheads.SILENT, SFT]
    checks = check_arms(bench, arms, short_rows(rows))
    series = time_steps(bench, rows, arms, repetitions=args.repetitions, discard=args.discard)
    entropy = overheads.entropy_seconds(bench, cut(rows, setting.batch_size, 1)[0], repetitions=args.repetitions)
    step_s = Spread.of([block.seconds for block in series["sft"]]).median
    content = results(
        "overheads",
        prologue=prologue,
        settings=settings_of(setting, source, seed=args.seed, is_tiny=args.tiny),
        series=series,
        equality=checks,
        ratios={
            "trainer_over_bare_loop": ratio(series, "sft", "bare_sft"),
            "telemetry_on_over_off": ratio(series, "sft", "sft_silent"),
            "entropy_on_over_off": Spread.of([step_s / (step_s - seconds) for seconds in entropy]),
        },
    )
    _write(args, "overheads.json", content)


def _write(args: argparse.Namespace, name: str, content: Results) -> None:
    write_results(Path(args.out or RESULTS) / name, content)
    say(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in content["ratios"].items()))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="the five ratios, within --seconds")
    add("--out", help="with --quick the file, else the folder of results; default benchmarks/results")
    add("--suite", choices=("steps", "k_sweep", "overheads"), default="steps")
    add("--batch-size", type=int, nargs="+", help="rows of a step; default 8 and 32; quick: the most up to 8 that fits")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), help="default: both; quick: the faster one here")
    add("--rows-at-once", type=int, default=8, help="of one forward of plain HF and TRL; 8 of plain HF take 9 GB")
    add("--arms", nargs="+", choices=sorted(ARMS), help="arms of the steps suite; default: all of its own")
    add("--repetitions", type=int, default=5, help="that are kept; quick stops earlier when the time is up")
    add("--discard", type=int, default=1, help="repetitions before those; --quick warms up on short rows instead")
    add("--seconds", type=float, default=QUICK_SECONDS, help="wall time that --quick may take")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of one thread, for a machine in use")
    add("--seed", type=int, default=0, help="of the order of the rows")
    add("--tiny", action="store_true", help="a random model and random rows, to try the code")
    args = parser.parse_args(argv)
    if not args.quick:
        args.dtype, args.batch_size = args.dtype or ["float32", "bfloat16"], args.batch_size or [8, 32]
    if args.quick and not args.out:
        parser.error("--quick writes one file: give --out FILE")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    quieten()
    clock = make_clock(args.clock)
    if is_contended():
        say("this machine is busy: more processes want a core than there are. Times are worth little; see --clock cpu")
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            content = run_quick(
                clock,
                Path(folder),
                budget=Budget(args.seconds, _STARTED),
                repetitions=args.repetitions,
                dtype=args.dtype[0] if args.dtype else None,
                batch_size=args.batch_size[0] if args.batch_size else None,
                seed=args.seed,
                is_tiny=args.tiny,
            )
            write_results(args.out, content)
            for name, value in content["ratios"].items():
                print(f"{name:28} {value:.3f}")
        else:
            suites = {"steps": run_steps, "k_sweep": run_k_sweep, "overheads": run_overheads}
            suites[args.suite](args, clock, Path(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
