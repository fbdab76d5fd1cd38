"""Arms on a tiny model: what a block times, what it leaves out, and that arms do not disturb each other."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from benchmarks.arms import Setting, StepMarks, Workbench
from benchmarks.clocks import WallClock
from benchmarks.steps import ARMS, cut, headline_ratios, make_workbench, time_steps
from benchmarks.trainer_arms import SFT, psft
from benchmarks.workload import Tokens


class CountingClock:
    """One second each time somebody looks."""

    name = "counting"

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1.0
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return make_workbench(Setting(4), CountingClock(), tmp_path, is_tiny=True)[0]


@pytest.fixture
def rows(tmp_path: Path) -> list:
    return make_workbench(Setting(4), WallClock(), tmp_path, is_tiny=True)[1]


def test_steps_not_taken_count_as_long_as_the_one_after_the_first(bench: Workbench, rows: list) -> None:
    """Looks at: epoch begin 1, step one 2 to 3, step two 4 to 5, epoch end 6. So 5 s for two of four steps, 2 s from
    the end of one to that of the next, 5 + 2 x 2 = 9 s for the window, 9 / 4 a mini-batch. Goes red if the steps
    that are left out are not counted, or counted with the old pass in them."""
    (mini_batch,) = cut(rows, 4, 1)
    block = psft(4).on(bench).block([mini_batch] * 4)
    assert block.details["steps_taken"] == 2
    assert block.seconds == 9 / 4


def test_a_whole_window_is_timed_as_it_is(bench: Workbench, rows: list) -> None:
    """Begin 1, steps 2 to 3 and 4 to 5, end 6, over 2 mini-batches. Goes red if a whole window is extrapolated."""
    block = psft(2, steps=2).on(bench).block(cut(rows, 4, 2))
    assert block.seconds == 5 / 2


def test_different_rows_are_never_extrapolated(bench: Workbench, rows: list) -> None:
    """Goes red if a window of unequal mini-batches may be cut short."""
    with pytest.raises(AssertionError, match="cannot tell what is left out"):
        psft(4).on(bench).block(cut(rows, 4, 4))


def test_every_block_begins_with_the_same_weights_and_the_arms_own_forward(bench: Workbench, rows: list) -> None:
    """Goes red if `restore` leaves weights, a foreign forward or accelerate's mark on the model: losses of the first
    step would drift from block to block, forwards would pile up, and bfloat16 arms would run without autocast."""
    (mini_batch,) = cut(rows, 4, 1)
    bench.optimizer.param_groups[0]["lr"] = 0.1
    arms = {name: ARMS[name].on(bench) for name in ("sft", "trl_sft", "hf", "gem")}
    first = {name: arm.block([mini_batch]).details["loss"] for name, arm in arms.items()}
    second = {name: arm.block([mini_batch]).details["loss"] for name, arm in arms.items()}
    assert first == second
    assert first["sft"] == pytest.approx(first["hf"], rel=1e-5) and first["trl_sft"] == pytest.approx(first["hf"])
    assert first["gem"] != pytest.approx(first["hf"], rel=1e-2)
    bench.restore()
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(bench.model))


def test_tokens_are_those_of_the_rows() -> None:
    """Goes red if padding is counted as real, or the first token, which nothing predicts, as trained."""
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    ]
    assert Tokens.of(rows) == Tokens(real=8, trained=5, padded=10)


def test_marks_stop_a_run_at_its_limit(bench: Workbench, rows: list) -> None:
    """Goes red if the limit is not obeyed: the rest of the data would be trained, and timed."""
    arm = SFT.on(bench)
    arm.train(cut(rows, 4, 3), 2)
    marks: StepMarks = arm._marks
    assert len(marks.steps) == 2


def test_a_signal_ends_the_benchmark(bench: Workbench, rows: list) -> None:
    """psft's trainer finishes its step and returns. Goes red if the next arm is then timed as if nothing had been."""

    class Impatient(TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    arm = SFT.on(bench)
    arm._built(rows[:4]).add_callback(Impatient())
    with pytest.raises(SystemExit) as ended:
        arm.block(cut(rows, 4, 1))
    assert ended.value.code == 128 + signal.SIGTERM


def test_ratios_have_the_names_of_the_issue(bench: Workbench, rows: list) -> None:
    """Goes red if an arm is left out of a repetition, or a ratio stands on its head: psft takes more than sft."""
    series = time_steps(bench, rows, [ARMS[n] for n in ("hf", "trl_sft", "sft", "psft_k8")], repetitions=1)
    ratios = headline_ratios(series)
    assert set(ratios) == {"psft_over_sft", "sft_over_trl_sft", "psft_over_trl_sft", "sft_over_plain_hf"}
    assert {len(blocks) for blocks in series.values()} == {1}
    seconds = {name: blocks[0].seconds for name, blocks in series.items()}
    assert ratios["psft_over_sft"].median == seconds["psft_k8"] / seconds["sft"]


def test_optimizer_and_model_are_shared(bench: Workbench, rows: list) -> None:
    """Goes red if a trainer makes an optimizer of its own: arms would differ in its state and memory."""
    (mini_batch,) = cut(rows, 4, 1)
    for name in ("sft", "hf"):
        ARMS[name].on(bench).block([mini_batch])
    steps = {float(state["step"]) for state in bench.optimizer.state.values()}
    assert steps == {2.0}
    assert all(torch.isfinite(p).all() for p in bench.model.parameters())
