"""Train a run in one go, and once more with SIGKILL at random moments, resumed until done.

    python kill_runs.py FOLDER NUM_KILLS SEED -- ARGUMENTS OF psft train, without --output_dir

leaves FOLDER/whole and FOLDER/killed and prints, as JSON, the steps each attempt had reached when it was killed.
Every attempt is a forked child, so that libraries are loaded once and the moments fall into training.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch

import psft.trainers  # noqa: F401  loaded here once, so that children need no time for it
from psft.cli.main import main
from psft.data import prepare_dataset  # noqa: F401
from psft.models import load_model  # noqa: F401


def attempt(arguments: list[str], output_dir: Path, log: Path, killed_after_s: float | None) -> int:
    """Exit code of one attempt; -9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = main(["train", *arguments, "--output_dir", str(output_dir)])
        finally:
            os._exit(code)
    if killed_after_s is not None:
        end = time.monotonic() + killed_after_s
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps_of(output_dir: Path) -> int:
    path = output_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(folder: Path, num_kills: int, seed: int, arguments: list[str]) -> list[int]:
    torch.set_num_threads(1)
    started = time.monotonic()
    code = attempt(arguments, folder / "whole", folder / "whole.log", None)
    if code != 0:
        sys.exit(f"the uninterrupted run failed with {code}:\n{(folder / 'whole.log').read_text()[-3000:]}")
    duration_s = time.monotonic() - started
    moments, reached = random.Random(seed), []
    killed, log = folder / "killed", folder / "killed.log"
    while len(reached) < num_kills:
        code = attempt([*arguments, "--resume"], killed, log, moments.uniform(0.0, duration_s * 0.6))
        if code == 0:  # done before the moment came: the next one starts over
            reached.append(steps_of(killed))
            for path in sorted(killed.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            killed.rmdir()
        elif code == -signal.SIGKILL:
            reached.append(steps_of(killed))
        else:
            sys.exit(f"an attempt ended with {code}:\n{log.read_text()[-3000:]}")
    code = attempt([*arguments, "--resume"], killed, log, None)
    if code != 0:
        sys.exit(f"the last attempt failed with {code}:\n{log.read_text()[-3000:]}")
    return reached


if __name__ == "__main__":
    separator = sys.argv.index("--")
    folder_, num_kills_, seed_ = sys.argv[1:separator]
    print(json.dumps(run(Path(folder_), int(num_kills_), int(seed_), sys.argv[separator + 1 :])))
