"""All benchmarks of this machine, one process after another, and then the tables: `python -m benchmarks`.

On 2 quiet cores this takes hours (the float32 steps at batch 32 most of them): see docs/performance.md.
`python -m benchmarks head overheads` runs some of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_HERE = Path(__file__).resolve().parent

SUITES: dict[str, list[str]] = {
    "startup": ["startup.py"],
    "head": ["head.py"],
    "overheads": ["train_step.py", "--suite", "overheads"],
    "k_sweep": ["train_step.py", "--suite", "k_sweep"],
    "sweeps": ["sweeps.py"],
    "generation": ["generation.py"],
    "steps": ["train_step.py", "--suite", "steps"],
    "grading": ["grading.py"],
    "gpu": ["gpu.py"],
    "head_gpu": ["head.py", "--device", "cuda"],
}
_NEED_A_GPU = ("gpu", "head_gpu")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; default: all that this machine can run")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.suites) - set(SUITES))
    if unknown:
        parser.error(f"no suite is called {', '.join(unknown)}; there are {', '.join(SUITES)}")
    for name in args.suites or _possible():
        print(f"== {name}", file=sys.stderr, flush=True)
        script, *rest = SUITES[name]
        done = subprocess.run([sys.executable, str(_HERE / script), *rest], check=False)
        if done.returncode:
            print(f"{name} ended with exit code {done.returncode}", file=sys.stderr)
            return 1
    from benchmarks import tables

    return tables.main([])


def _possible() -> list[str]:
    import torch

    return [name for name in SUITES if name not in _NEED_A_GPU or torch.cuda.is_available()]


if __name__ == "__main__":
    raise SystemExit(main())
