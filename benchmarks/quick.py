"""The five headline ratios within three minutes: what `train_step.py --quick` runs.

The budget decides how many rows a mini-batch has (8, or fewer on a slow or busy machine) and how many repetitions are
kept; both are in the results. Ratios of time come from mini-batches of that size, peak memory from one of 8 rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import Setting, Workbench
from benchmarks.clocks import Clock
from benchmarks.harness import Budget, results, say
from benchmarks.prologue import describe_run, is_contended
from benchmarks.steps import (
    ARMS,
    check_arms,
    headline_ratios,
    make_workbench,
    memory_ratio,
    settings_of,
    short_rows,
    time_steps,
)
from benchmarks.trainer_arms import SFT
from benchmarks.workload import Row

QUICK = ("hf", "trl_sft", "sft", "psft_k8")
_WANTED_REPETITIONS = 3  # that must fit, else the mini-batch is made smaller
_SIZES = (8, 6, 4, 3, 2)
_REPETITION_IN_SFT_STEPS = 9.5  # of the four arms, about: hf 1.7, TRL 2.5, sft 1, psft 7 / 3 + 2
_MEMORY_STEPS_S = 10.0  # of one process of memory.py, beside its start


def run_quick(
    clock: Clock,
    folder: Path,
    *,
    budget: Budget,
    repetitions: int,
    dtype: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    is_tiny: bool = False,
) -> dict[str, Any]:
    """Results of the suite "quick".

    Args:
        budget: no repetition begins that would overrun it; counted from the start of the process.
        dtype: None = the faster one here. batch_size: None = the most up to 8 that fits.
    """
    bench, rows, source = make_workbench(Setting(2), clock, folder, seed=seed, is_tiny=is_tiny)
    prologue = describe_run(clock)
    loaded_s = budget.spent
    say(f"loaded; GFLOP/s {prologue['matmul_gflops']}")
    dtype = dtype or faster_dtype(prologue["matmul_gflops"])
    arms = [ARMS[name] for name in QUICK]
    checks = check_arms(bench, arms, short_rows(rows))

    def reserve() -> float:
        return 2 * (loaded_s + _MEMORY_STEPS_S)

    size = batch_size or fitting_size(bench, rows, dtype, budget, reserve())
    setting = Setting(size, dtype)
    say(f"{source}; {dtype}, {size} rows a step")
    series = time_steps(
        bench.with_setting(setting),
        rows,
        arms,
        repetitions=repetitions,
        budget=budget,
        warms_up_short=True,
        reserve=reserve,
    )
    bench.release()
    memory, memory_spread = memory_ratio(max(size, 8), dtype, seed=seed, is_tiny=is_tiny)
    return results(
        "quick",
        prologue=prologue,
        settings=settings_of(setting, source, seed=seed, is_tiny=is_tiny),
        series=series,
        equality=checks,
        ratios={**headline_ratios(series), "peak_memory_over_plain_hf": memory_spread},
        more={"memory": memory, "is_contended": is_contended(), "wall_time_s": budget.spent},
    )


def faster_dtype(gflops: Mapping[str, float]) -> str:
    """bfloat16 where its products are clearly faster."""
    return "bfloat16" if gflops["bfloat16"] > 1.2 * gflops["float32"] else "float32"


def fitting_size(bench: Workbench, rows: Sequence[Row], dtype: str, budget: Budget, reserve: float) -> int:
    """The most rows of a mini-batch with which a few repetitions still fit, going by one step on two rows."""
    probe = SFT.on(bench.with_setting(Setting(2, dtype)))
    probe.warm_up(short_rows(rows))
    began = time.monotonic()
    probe.train([rows[:2]], 1)
    row_s = (time.monotonic() - began) / 2
    probe.close()
    left = budget.seconds - budget.spent - reserve
    say(f"a row takes {row_s:.2f} s in plain SFT; {left:.0f} s are left for repetitions")
    return largest_fitting(row_s, left)


def largest_fitting(row_s: float, left_s: float) -> int:
    """Rows of a mini-batch, so that the wanted repetitions and half of one more take at most `left_s` seconds."""
    repetition_s = _REPETITION_IN_SFT_STEPS * row_s
    fitting = [size for size in _SIZES if size * repetition_s * (_WANTED_REPETITIONS + 0.5) <= left_s]
    return fitting[0] if fitting else _SIZES[-1]
