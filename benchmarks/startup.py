"""How long a command takes until it answers, or until it trains: fresh processes, in turn.

    python benchmarks/startup.py                     writes benchmarks/results/startup.json

Wall time is what a person waits. Processor time, children included, is beside it: it hardly depends on what else the
machine does. The cache is a folder of its own with the quick-start model in it; the repetition that is discarded fills
it, so that the kept ones are warm. `train_*` ends when the run folder shows what it waits for:

    train_ready        run.json: model, data and trainer are there, the first step begins
    train_first_step   the first row of metrics.jsonl: the old pass of a window and one optimizer step later
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil

import psft
from benchmarks.clocks import WallClock
from benchmarks.harness import Block, interleave, results, say, write_results
from benchmarks.prologue import describe_run, is_contended, load_average
from psft.machine import cache_folder

RESULTS = Path(__file__).resolve().parent / "results"
_ALONE = ("--eval_on_start", "false", "--probe_every", "0", "--max_steps", "1")
_POLL_S = 0.005


@dataclass(frozen=True)
class Start:
    """A command; `until`: the file of the run folder at whose first byte the clock stops, None = its end."""

    argv: tuple[str, ...]
    until: str | None = None


def starts(request: Sequence[str]) -> dict[str, Start]:
    """What is timed, by name. request: a recipe, or flags."""
    train = ("train", *request, *_ALONE)
    return {
        "help": Start(("--help",)),
        "train_help": Start(("train", "--help")),
        "plan": Start(("plan", *request)),
        "plan_anew": Start(("plan", *request, "--no_data_cache")),
        "train_ready": Start(train, "run.json"),
        "train_first_step": Start(train, "metrics.jsonl"),
    }


def time_start(start: Start, folder: Path) -> Block:
    """One process from its start to its end, or to what it waits for; then it is ended.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    source = str(Path(psft.__file__).resolve().parents[1])
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    argv = [sys.executable, "-m", "psft.cli.main", *start.argv]
    argv += [] if start.until is None else ["--output_dir", str(run)]
    environment = {**os.environ, "PSFT_CACHE": str(folder / "cache"), "PYTHONPATH": source}
    with (folder / "said.txt").open("w+") as said:
        load, began = load_average(), time.monotonic()
        process = subprocess.Popen(argv, stdout=said, stderr=said, stdin=subprocess.DEVNULL, env=environment)
        watched, processor_s = psutil.Process(process.pid), 0.0
        while not _is_there(run, start.until) and process.poll() is None:
            with contextlib.suppress(psutil.Error):
                processor_s = _processor_s(watched)
            time.sleep(_POLL_S)
        seconds = time.monotonic() - began
        if _is_there(run, start.until):
            with contextlib.suppress(psutil.Error):
                processor_s = _processor_s(watched)
            process.kill()
            process.wait()
        elif start.until is not None or process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(start.argv)}: exit code {process.returncode}: {said.read()[-2000:]}")
    return Block(seconds, {"processor_s": processor_s, "load_average": load})


def _is_there(run: Path, name: str | None) -> bool:
    with contextlib.suppress(OSError):
        return name is not None and (run / name).stat().st_size > 0
    return False


def _processor_s(process: psutil.Process) -> float:
    spent = process.cpu_times()
    return float(spent.user + spent.system + spent.children_user + spent.children_system)


def measure(request: Sequence[str], *, repetitions: int, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Results of the suite "startup"."""
    prologue = describe_run(WallClock())
    wanted = {name: start for name, start in starts(request).items() if only is None or name in only}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cache").mkdir()
        if (cache_folder() / "models").is_dir():
            (folder / "cache" / "models").symlink_to((cache_folder() / "models").resolve())

        def timed(start: Start) -> Callable[[int], Block]:
            return lambda repetition: time_start(start, folder)

        series = interleave(
            {name: timed(start) for name, start in wanted.items()}, repetitions=repetitions, discard=1, say=say
        )
    return results(
        "startup",
        prologue=prologue,
        settings={"request": list(request), "alone": list(_ALONE)},
        series=series,
        more={"is_contended": is_contended()},
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "startup.json")
    parser.add_argument("--repetitions", type=int, default=5, help="that are kept, after one that is not")
    parser.add_argument("--only", nargs="+", choices=sorted(starts(())), help="default: all")
    parser.add_argument("request", nargs="*", default=["quickstart"], help="a recipe; default: quickstart")
    args = parser.parse_args(argv)
    if is_contended():
        say("this machine is busy: more processes want a core than there are. Wall times are worth little")
    write_results(args.out, measure(args.request, repetitions=args.repetitions, only=args.only))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
