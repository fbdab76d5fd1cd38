"""Jobs of two ranks under `psft train --num_processes 2`: how they begin, and how a rank or a signal ends them."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from psft.cli import launch as launching
from psft.machine import LOCAL_RANK

pytestmark = pytest.mark.slow  # whole jobs of several processes

OBJECTIVE = """
import os, signal, time, torch

def gives_up(logps, completion_mask, *, normalizer, at=0, how="raise", _count=[0]):
    _count[0] += 1
    if _count[0] == at and torch.distributed.get_rank() == 1:
        if how == "raise":
            raise ValueError("the objective of rank 1 gives up")
        os.kill(os.getpid(), signal.SIGKILL)
    return -torch.where(completion_mask, logps, 0.0).sum() / normalizer

def slow(logps, completion_mask, *, normalizer, seconds=0.5):
    time.sleep(seconds)
    return -torch.where(completion_mask, logps, 0.0).sum() / normalizer
"""
IN_A_JOB = (*LOCAL_RANK, launching.FOLDER, "RANK", "DS_ACCELERATOR")


@pytest.fixture
def start(tiny_model_path, demonstrations, tiny_tokenizer, tmp_path):
    """start(*flags, **variables) -> a running `psft train` of two ranks on the tiny model, into tmp_path/run."""
    data = tmp_path / "rows.jsonl"
    with data.open("w") as lines:
        for row in demonstrations:
            begin = row["labels"].index(next(label for label in row["labels"] if label != -100))
            text = [tiny_tokenizer.decode(row["input_ids"][part]) for part in (slice(begin), slice(begin, None))]
            lines.write(json.dumps({"prompt": text[0], "completion": text[1]}) + "\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "own_objective.py").write_text(OBJECTIVE)
    started = []

    def begin(*flags, **variables):
        command = [
            sys.executable, "-m", "psft.cli.main", "train", "--model_name_or_path", str(tiny_model_path),
            "--dataset", str(data), "--output_dir", str(tmp_path / "run"), "--max_steps", "8",
            "--train_batch_size", "16", "--mini_batch_size", "4", "--max_tokens_per_micro_batch", "96",
            "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--bf16", "false", "--report_to", "none",
            "--save_strategy", "no", "--gradient_checkpointing", "false", "--disable_tqdm", "true",
            "--num_processes", "2", "--use_cpu", *flags,
        ]  # fmt: skip
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(tmp_path / "lib"), *([inherited] if inherited else [])])
        outside = {name: value for name, value in os.environ.items() if name not in IN_A_JOB}
        environment = {**outside, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()  # its ranks follow
            process.communicate()


def steps_of(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.open()] if path.exists() else []


def wait_for_steps(folder, number, limit_s=120.0):
    end = time.monotonic() + limit_s
    while len(steps_of(folder)) < number and time.monotonic() < end:
        time.sleep(0.02)


def ended(process, limit_s=150.0):
    """(exit code, stdout, stderr)"""
    out, errors = process.communicate(timeout=limit_s)
    return process.returncode, out, errors


def test_two_ranks_train_one_run_and_one_of_them_talks(start, tmp_path):
    """Goes red if the ranks are not started, if each prints, or if another than rank 0 writes."""
    process = start(
        "--eval_dataset", f"rows={tmp_path / 'rows.jsonl'}", "--eval_split", "train", "--logging_steps", "4"
    )
    code, out, errors = ended(process)
    assert code == 0, errors
    lines = out.splitlines()
    assert sum(line.startswith("train: 32 rows") for line in lines) == 1
    assert sum(line.startswith("rows_nll") for line in lines) == 1, "the closing table"
    assert sum("'learning_rate'" in line for line in lines) == 2
    assert steps_of(tmp_path / "run") == list(range(1, 9))
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["world_size"] == 2 and info["distributed_type"] == "MULTI_CPU" and "--num_processes" in info["command"]
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.timeout(900)  # DeepSpeed compiles its shared-memory communication once a machine
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_trains_on_a_cpu_from_the_command_line(start, tmp_path, kind):
    """Goes red if the shipped file is refused by DeepSpeed, or if the model is not written whole at the end."""
    code, _, errors = ended(start("--accelerate", kind, DS_ACCELERATOR="cpu"), 800)
    assert code == 0, errors
    assert steps_of(tmp_path / "run") == list(range(1, 9))
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["world_size"] == 2 and info["distributed_type"] == "DEEPSPEED"
    from psft.models import load_model

    assert all(bool(p.isfinite().all()) and p.numel() for p in load_model(str(tmp_path / "run")).parameters())


def test_a_wrong_request_is_told_once_and_exits_with_2(start, tmp_path):
    """Goes red if torchrun's exit code comes through, its account of the ranks, or the message twice."""
    code, out, errors = ended(start("--max_tokens_per_micro_batch", "20"))
    assert code == 2
    assert errors.count("psft train: error: max_tokens_per_micro_batch=20 is a hard cap") == 1
    assert "Traceback" not in errors and "ChildFailed" not in errors
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_exception_on_one_rank_ends_all_with_its_traceback(start, tmp_path, kind):
    """Goes red if the other rank waits for it, or answers with a traceback of its own about a lost connection."""
    flags = ["--objective", "own_objective:gives_up", "--objective_settings", "at=9"]  # in the third step or later
    process = start("--accelerate", kind, *flags)
    wait_for_steps(tmp_path / "run", 2)
    since = time.monotonic()
    code, _, errors = ended(process)
    assert time.monotonic() - since < 60
    assert code == 1 and errors.count("Traceback") == 1
    assert "rank 1 of 2 failed" in errors and "ValueError: the objective of rank 1 gives up" in errors
    assert "closed by peer" not in errors and "ChildFailed" not in errors


def test_a_killed_rank_is_named_and_the_run_goes_on_from_its_checkpoint(start, tmp_path):
    """Goes red if the launcher waits, ends with 0, or blames the rank that lost the connection."""
    flags = ["--objective", "own_objective:gives_up", "--save_strategy", "steps", "--save_steps", "2"]
    code, _, errors = ended(start(*flags, "--objective_settings", "at=9,how=kill"))
    assert code == 1 and "psft train: failed: rank 1 was killed by SIGKILL" in errors and "--resume" in errors
    assert "Traceback" not in errors
    assert len(steps_of(tmp_path / "run")) < 8
    settings = ["--resume", "--allow_changed", "objective", "--objective_settings", "at=0"]
    code, _, errors = ended(start(*flags, *settings))
    assert code == 0, errors
    assert steps_of(tmp_path / "run") == list(range(1, 9))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed"][0]["step"] >= 2


def test_a_run_of_two_ranks_goes_on_as_one_where_that_is_allowed(start, tmp_path):
    """Goes red if the number of processes is not compared, or if a rank's own files are missed by another number."""
    flags = ["--save_strategy", "steps", "--save_steps", "1"]
    code, _, errors = ended(start(*flags, "--max_steps", "6"))
    assert code == 0, errors
    alone = [*flags, "--resume", "--num_processes", "1"]
    code, _, errors = ended(start(*alone))
    assert code == 2 and "world_size: it was 2 and is 1" in errors and "--allow_changed world_size" in errors
    code, _, errors = ended(start(*alone, "--allow_changed", "world_size"))
    assert code == 0 and "next window boundary" in errors, errors
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, 9)) and rows[6]["mini_batch"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_all", [True, False])
def test_a_signal_stops_all_ranks_after_the_step_with_one_checkpoint(start, tmp_path, number, to_all):
    """To the launcher alone, as a terminal sends it, or to every process of the job, as a scheduler does.

    Goes red if ranks get it twice and stop at once, if a worker that reads data dies of it, or if the exit code is 1.
    """
    process = start("--max_steps", "400", "--save_strategy", "steps", "--save_steps", "1000",
                    "--dataloader_num_workers", "1")  # fmt: skip
    wait_for_steps(tmp_path / "run", 3)
    launcher = psutil.Process(process.pid)
    others = launcher.children(recursive=True) if to_all else []
    assert len(others) >= 4 or not to_all
    for one in [launcher, *others]:
        one.send_signal(number)
    code, _, errors = ended(process)
    assert code == 128 + number, errors
    assert errors.count("finishing this step") == 1 and "Traceback" not in errors
    steps = steps_of(tmp_path / "run")
    assert len(steps) < 400
    assert (tmp_path / "run" / f"checkpoint-{len(steps)}" / "psft_manifest.json").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "interrupted"


def test_a_second_signal_ends_all_ranks_at_once(start, tmp_path):
    """Goes red if the second one waits for the step, too."""
    flags = ["--objective", "own_objective:slow", "--objective_settings", "seconds=20"]
    process = start(*flags, "--save_strategy", "steps", "--save_steps", "1000", "--eval_strategy", "no")
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "run.json").exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(3)  # in the first step, or just before it
    ranks = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    time.sleep(launching.SAME_SIGNAL_S + 0.5)
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, errors = ended(process)
    assert code == 130 and time.monotonic() - since < 10, errors
    assert not any(rank.is_running() for rank in ranks) and "Traceback" not in errors


def test_ranks_end_with_their_launcher(start, tmp_path):
    """Goes red if ranks go on writing after the launcher was killed: a resumed run would meet them in its folder."""
    process = start("--max_steps", "100000")
    wait_for_steps(tmp_path / "run", 3)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
