"""What the suites of whole optimizer steps share: the arms by name, their equality check, timing, the ratios."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import overheads, workload
from benchmarks.arms import Setting, Workbench
from benchmarks.clocks import Clock
from benchmarks.equality import Outcome, check_equal, describe, gradients_of
from benchmarks.harness import Budget, Spread, interleave, ratio, say
from benchmarks.memory import measure_apart
from benchmarks.trainer_arms import DFT, GEM, HF, HF_COMPACT, SFT, SFT_KL, TRL_DFT, TRL_SFT, plain_loss, psft
from benchmarks.workload import Row
from psft.ops.precision import choose_cpu_matmul_precision

WINDOWS = (1, 2, 4, 8, 16)
_EVERY_ARM: tuple[Any, ...] = (
    HF, HF_COMPACT, TRL_SFT, TRL_DFT, SFT, DFT, *(psft(window) for window in WINDOWS), GEM, SFT_KL, overheads.BARE,
    overheads.SILENT,
)  # fmt: skip
ARMS: dict[str, Any] = {arm.name: arm for arm in _EVERY_ARM}
STEPS = ("hf", "hf_compact", "trl_sft", "trl_dft", "sft", "dft", "psft_k8", "gem", "sft_kl")
RESULTS = Path(__file__).resolve().parent / "results"
Results = dict[str, Any]
_NUM_MINI_BATCHES = 8  # different ones; repetitions take them in turn


def make_workbench(
    setting: Setting, clock: Clock, folder: Path, *, seed: int = 0, is_tiny: bool = False
) -> tuple[Workbench, list[Row], str]:
    """Model, rows, and where the rows are from. Tiny: random weights and ids, for tests."""
    if is_tiny:
        shape = workload.tiny_architecture()
        model, tokenizer = workload.random_model(shape, device=setting.device), workload.plain_tokenizer()
        rows = workload.synthetic_rows(256, vocab_size=shape.vocab_size, median=24, seed=seed)
        source = "random ids"
    else:
        choose_cpu_matmul_precision()
        model, tokenizer = workload.load_bundled()
        rows, source = workload.demonstrations(tokenizer, seed=seed)
    return Workbench(model.to(setting.device), tokenizer, setting, clock, folder), rows, source


def check_arms(bench: Workbench, arms: Sequence[Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Loss and gradient of every arm, in float32, against its family's plain loss with autograd.

    Args:
        rows: one small mini-batch of unequal lengths.
    Raises:
        ArmsDiffer: by name, before anything is timed.
    """
    bench = bench.with_setting(Setting(len(rows), "float32", bench.setting.device, max_tokens=bench.setting.max_tokens))
    checks = []
    for family in dict.fromkeys(arm.family for arm in arms):
        bench.restore()
        loss = plain_loss(family, bench.model, list(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bench.model.parameters(), 1.0)
        judge = Outcome(float(loss.detach()), gradients_of(bench.model))
        for arm in arms:
            if arm.family == family:
                running = arm.on(bench)
                checks.append(check_equal(arm.name, running.outcome(rows), f"plain {family}", judge, rtol=arm.rtol))
                running.close()
    say(describe(checks))
    return checks


def short_rows(rows: Sequence[Row]) -> list[Row]:
    """Two excerpts of unequal length, for what is not timed."""
    return [workload.excerpt(rows[0], 32), workload.excerpt(rows[1], 44)]


def cut(rows: Sequence[Row], size: int, number: int) -> list[list[Row]]:
    """The first `number` mini-batches of `size` rows."""
    assert len(rows) >= size * number, f"{size * number} rows are needed and there are {len(rows)}"
    return [list(rows[size * i : size * (i + 1)]) for i in range(number)]


def time_steps(
    bench: Workbench,
    rows: Sequence[Row],
    arms: Sequence[Any],
    *,
    repetitions: int,
    discard: int = 1,
    budget: Budget | None = None,
    warms_up_short: bool = False,
    reserve: Any = lambda: 0.0,
) -> Any:
    """Interleaved blocks of all arms; repetition r takes mini-batch r.

    warms_up_short: in place of a first repetition that is discarded, a block of short rows for each arm.
    """
    running = {arm.name: arm.on(bench) for arm in arms}
    if warms_up_short:
        warm = short_rows(rows)
        for arm in running.values():
            arm.warm_up(warm)
        say("warmed up")
    mini_batches = cut(rows, bench.setting.batch_size, min(_NUM_MINI_BATCHES, len(rows) // bench.setting.batch_size))

    def timed(arm: Any) -> Any:
        return lambda repetition: arm.block([mini_batches[repetition % len(mini_batches)]] * arm.arm.window)

    series = interleave(
        {name: timed(arm) for name, arm in running.items()},
        repetitions=repetitions,
        discard=0 if warms_up_short else discard,
        budget=budget,
        reserve=reserve,
        say=say,
    )
    for arm in running.values():
        arm.close()
    return series


def headline_ratios(series: Any, window: int = 8) -> dict[str, Spread]:
    """The ratios of time that docs/performance.md leads with."""
    wanted = {
        "psft_over_sft": (f"psft_k{window}", "sft"),
        "sft_over_trl_sft": ("sft", "trl_sft"),
        "psft_over_trl_sft": (f"psft_k{window}", "trl_sft"),
        "sft_over_plain_hf": ("sft", "hf"),
    }
    return {name: ratio(series, *pair) for name, pair in wanted.items() if set(pair) <= set(series)}


def memory_ratio(
    batch_size: int, dtype: str, *, seed: int, is_tiny: bool, rows_at_once: int | None = None
) -> tuple[dict[str, Any], Spread]:
    """Peak memory of psft and of plain HF, each in a process of its own, and the ratio of the whole processes."""
    ours, plain = (
        measure_apart(name, batch_size=batch_size, dtype=dtype, seed=seed, is_tiny=is_tiny, rows_at_once=rows_at_once)
        for name in ("psft_k2", "hf")
    )
    return {"psft": ours, "hf": plain}, Spread.of([ours["peak_bytes"] / plain["peak_bytes"]])


def quieten() -> None:
    """Keep libraries from talking between the lines of a benchmark."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")  # TRL itself sets it so
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("psft").setLevel(logging.ERROR)


def settings_of(setting: Setting, source: str, *, seed: int, is_tiny: bool) -> Results:
    """What a results file says of its run."""
    return {
        "model": "tiny" if is_tiny else "smollm2-135m-instruct",
        "rows": source,
        "seed": seed,
        "batch_size": setting.batch_size,
        "rows_at_once": setting.rows_at_once or setting.batch_size,
        "dtype": setting.dtype,
        "gradient_checkpointing": setting.gradient_checkpointing,
    }
