"""`psft grade` on answers as runs leave them: seconds for 100,000.

    python benchmarks/grading.py                         every mix in full: a quarter of an hour on 2 quiet cores
    python benchmarks/grading.py --answers 5000 math_repeated choice

The command is timed from its start to the file it leaves, with a worker a core. CPU seconds of it and all its workers
stand beside the wall time: on a busy machine they alone say anything. Mixes: `benchmarks/grading_mix.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import grading_mix
from benchmarks.clocks import make_clock
from benchmarks.harness import Block, interleave, results, say, write_results
from benchmarks.prologue import describe_run, is_contended

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
OUT = ROOT / "benchmarks" / "results" / "grading.json"
ALL = 100_000
"""Answers that seconds are given for, whatever was graded of them."""
_LONG_SHARE = 10
"""Long responses are graded by a tenth of the number: they would fill a disk."""
Row = dict[str, Any]

MIXES: dict[str, tuple[str, Callable[[int, Path], Iterator[Row]]]] = {
    "math_repeated": ("math", lambda n, data: grading_mix.mathematics("repeated", n, data)),
    "math_distinct": ("math", lambda n, data: grading_mix.mathematics("distinct", n, data)),
    "math_long": ("math", lambda n, data: grading_mix.mathematics("long", n // _LONG_SHARE, data)),
    "choice": ("choice", lambda n, data: grading_mix.choices(n, data)),
    "ifeval": ("ifeval", lambda n, data: grading_mix.instructions(n, data)),
}
"""Grader, and rows for it, by the name of the mix."""


def timed(name: str, num_answers: int, data: Path) -> Block:
    """One run of the command. Raises RuntimeError with its message if it fails."""
    grader, rows = MIXES[name]
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        num_rows, num_characters = _write(source, rows(num_answers, data))
        command = [sys.executable, "-m", "psft.cli.main", "grade", "--grader", grader, str(source), "--out", str(out)]
        command += ["--nltk_data", str(data / "ifeval" / "nltk_data")] if grader == "ifeval" else []
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"psft grade failed on {name}: {done.stderr.strip()[-2000:]}")
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        scale = ALL / num_rows
        details = {
            "answers": num_rows, "characters": num_characters, "wall_s": wall_s, "cpu_s": cpu_s,
            "cpu_s_per_100k": cpu_s * scale, "largest_process_bytes": after.ru_maxrss * 1024, **_counted(out),
        }  # fmt: skip
        return Block(wall_s * scale, details)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}


def _write(path: Path, rows: Iterator[Row]) -> tuple[int, int]:
    """Rows, and characters of their responses."""
    num_rows = num_characters = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            num_rows += 1
            num_characters += len(row["response"])
    return num_rows, num_characters


def _counted(path: Path) -> dict[str, float]:
    """What the grades were, so that a faster grader that grades otherwise is seen."""
    counts = {"score": 0.0, "without_answer": 0.0, "timed_out": 0.0}
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            timed_out = row["reason"].startswith("timed out")
            counts["score"] += row["score"]
            counts["timed_out"] += timed_out
            counts["without_answer"] += row["extracted"] is None and not timed_out
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixes", nargs="*", metavar="MIX", help=f"of {', '.join(MIXES)}; default: all")
    parser.add_argument("--answers", type=int, default=ALL)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--data_dir", type=Path, default=DATA, help="folder with math, mmlu_pro, ifeval and train")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.mixes) - set(MIXES))
    if unknown:
        parser.error(f"no mix is called {', '.join(unknown)}; there are {', '.join(MIXES)}")
    prologue = {**describe_run(make_clock("wall")), "is_contended": is_contended()}
    arms = {name: lambda _, name=name: timed(name, args.answers, args.data_dir) for name in args.mixes or MIXES}
    series = interleave(arms, repetitions=args.repetitions, discard=0, say=say)
    settings = {"answers": args.answers, "seconds_are_for": ALL, "workers": len(os.sched_getaffinity(0)), "seed": 0}
    write_results(args.out, results("grading", prologue=prologue, settings=settings, series=series))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
