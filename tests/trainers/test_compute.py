"""Threads and float32 precision: untouched unless asked for, chosen for the machine by "auto", written in run.json."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from psft import PSFTConfig
from psft.cli.train import read_request
from psft.errors import RequestError
from psft.ops import precision
from psft.trainers import compute


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(before[0])
    torch.set_float32_matmul_precision(before[1])


@pytest.fixture
def cores(monkeypatch) -> None:
    """Six cores, and nobody has chosen a number of threads."""
    monkeypatch.setattr(compute, "physical_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def asked(num_threads=None, matmul_precision=None) -> SimpleNamespace:
    return SimpleNamespace(num_threads=num_threads, matmul_precision=matmul_precision)


def test_a_trainer_leaves_the_process_as_it_is(make_trainer, cores):
    """Goes red if the defaults in Python are those of the command line."""
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("high")
    make_trainer()
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (3, "high")


def test_what_a_config_asks_for_is_set_and_written_down(make_trainer, tmp_path: Path):
    """Goes red if one of the two is ignored, or run.json holds the request instead of what is in force."""
    make_trainer(num_threads=2, matmul_precision="medium", max_steps=1).train()
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "medium")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["num_threads"], info["matmul_precision"]) == (2, "medium")
    assert info["environment"]["physical_cores"] >= 1


def test_auto_takes_one_thread_a_core_shared_by_the_ranks(cores, monkeypatch):
    """Goes red if ranks do not share, or more ranks than cores leave none."""
    compute.use_machine(asked("auto"))
    assert torch.get_num_threads() == 6
    for ranks, threads in ((4, 1), (2, 3), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        compute.use_machine(asked("auto"))
        assert torch.get_num_threads() == threads


def test_omp_num_threads_wins_over_auto_and_loses_to_a_number(cores, monkeypatch):
    """Goes red if auto overrides the environment, or the environment overrides what was asked for by name."""
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    compute.use_machine(asked("auto"))
    assert torch.get_num_threads() == 2
    compute.use_machine(asked(5))
    assert torch.get_num_threads() == 5


@pytest.mark.parametrize("name", ["high", "auto"])
def test_auto_precision_is_exact_on_a_cpu(name, monkeypatch):
    """Goes red if auto keeps a precision at which products err by more than float32's rounding."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    compute.use_machine(asked(matmul_precision=name))
    if name == "high":
        assert torch.get_float32_matmul_precision() == "high"
        return
    left, right = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1)).unbind()
    error = ((left @ right).double() - left.double() @ right.double()).abs().max()
    assert error < 1e-4 and torch.get_float32_matmul_precision() in ("highest", "medium")


def test_auto_precision_leaves_an_accelerator_to_its_user(monkeypatch):
    """Goes red if auto sets anything where an accelerator is: it would undo `tf32`."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    torch.set_float32_matmul_precision("high")
    assert precision.set_matmul_precision("auto") == "high"


def test_the_precision_can_be_named_after_tf32_was_set():
    """transformers sets `tf32` by torch's newer interface, in a process of its own here. Goes red if run.json asks
    torch by the older one, which then raises."""
    code = """
        import torch
        from psft.ops.precision import exact_small_products, matmul_precision
        torch.backends.fp32_precision = "tf32"
        try:
            torch.get_float32_matmul_precision()
        except RuntimeError:
            print("raises")
        with exact_small_products():
            print(matmul_precision())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.split() == ["raises", "tf32"], done.stderr


def test_the_command_line_asks_for_both_and_flags_win():
    """Goes red if `psft train` leaves its own process as torch made it, or overrides a flag."""
    basics = ["--model_name_or_path", "m", "--dataset", "d.jsonl"]
    config = read_request(basics, command="train").config
    assert (config.num_threads, config.matmul_precision) == ("auto", "auto")
    flags = ["--num_threads", "3", "--matmul_precision", "highest"]
    config = read_request([*basics, *flags], command="train").config
    assert (config.num_threads, config.matmul_precision) == (3, "highest")


def test_wrong_values_are_refused_together():
    """Goes red if one of them is found only when training starts."""
    with pytest.raises(RequestError, match="num_threads must be.*matmul_precision=fast must be one of auto, highest"):
        PSFTConfig(num_threads=0, matmul_precision="fast")
    with pytest.raises(RequestError, match="num_threads must be a number of threads or auto"):
        PSFTConfig(num_threads="many")
    both = SimpleNamespace(num_threads=None, matmul_precision="high", tf32=True)
    assert compute.compute_problems(both) == [
        "matmul_precision and tf32 both say how float32 products are rounded. Give one of them"
    ]
