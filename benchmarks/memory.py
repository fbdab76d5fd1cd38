"""Peak memory of one arm's optimizer steps, in a process of its own.

    python -m benchmarks.memory --arm psft_k2 --batch-size 8 --dtype bfloat16

glibc keeps what it was once given, so an arm that runs second in a process cannot show its own peak. On Linux the peak
counter is set back after a first step on one short row, when weights and optimizer state are there: what is reported is
the peak of the step that follows (of psft: with the old pass before it), whole process, and what was resident before.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Set this process's peak back to what is resident now; False where the system cannot."""
    try:
        _CLEAR.write_text("5")
        return True
    except OSError:
        return False


def trim_heap() -> None:
    """Make glibc give back what has been freed; elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int | None:
    """What is resident now; None where there is no /proc."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since `reset_peak`, or since the process began."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status_bytes(field: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def measure(
    arm_name: str, *, batch_size: int, dtype: str, seed: int, is_tiny: bool, rows_at_once: int | None = None
) -> dict[str, Any]:
    """Run this process's one arm and say what it took, in bytes."""
    from benchmarks.arms import Setting
    from benchmarks.clocks import WallClock
    from benchmarks.steps import ARMS, make_workbench
    from benchmarks.workload import Tokens

    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(batch_size, dtype, rows_at_once=rows_at_once)
        bench, rows, _ = make_workbench(setting, WallClock(), Path(folder), seed=seed, is_tiny=is_tiny)
        bench.let_go_of_weights()  # the copy would count
        arm = ARMS[arm_name].on(bench)
        arm.warm_up([min(rows, key=lambda row: len(row["input_ids"]))])
        before, was_reset = resident_bytes(), reset_peak()
        arm.train([rows[:batch_size]] * arm.arm.window, 1)
        return {
            "arm": arm_name,
            "peak_bytes": peak_bytes(),
            "resident_before_bytes": before,
            "was_reset": was_reset,
            "weights_bytes": sum(p.numel() * p.element_size() for p in bench.model.parameters()),
            "batch_size": batch_size,
            **Tokens.of(rows[:batch_size]).to_dict(),
        }


def measure_apart(
    arm_name: str, *, batch_size: int, dtype: str, seed: int = 0, is_tiny: bool = False, rows_at_once: int | None = None
) -> dict[str, Any]:
    """`measure` in a fresh process.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--arm", arm_name, "--batch-size", str(batch_size)]
    command += ["--dtype", dtype, "--seed", str(seed), *(["--tiny"] if is_tiny else [])]
    command += ["--rows-at-once", str(rows_at_once)] if rows_at_once else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"memory of {arm_name}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Peak memory of one arm; prints one JSON object.")
    parser.add_argument("--arm", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rows-at-once", type=int, help="of one forward of plain HF and TRL; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a random model of a few thousand parameters, for tests")
    args = parser.parse_args(argv)
    result = measure(
        args.arm,
        batch_size=args.batch_size,
        dtype=args.dtype,
        seed=args.seed,
        is_tiny=args.tiny,
        rows_at_once=args.rows_at_once,
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
