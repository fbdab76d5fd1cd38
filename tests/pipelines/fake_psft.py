"""Stands for psft in tests of pipelines: commands that take milliseconds and leave what the real ones leave.

    python fake_psft.py FOLDER KEY PARENT -- COMMAND ...

train and grpo write one "step" per 20 ms up to --max_steps into metrics.jsonl, a checkpoint after each, and stop at
SIGTERM or SIGINT as the real ones do; --fail N ends with code N after the first step, --kill kills the process there.
eval writes results, report a page. Every call appends its command line to calls.jsonl beside the stage folders.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from psft.cli.attend import attend


def flags_of(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    words = [word for word in arguments if not word.startswith("--")]
    return words, dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))


def train(folder: Path, flags: dict[str, str]) -> int:
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    metrics = folder / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    model = Path(flags["model_name_or_path"])
    weights = (model / "model.safetensors").read_text() if model.is_dir() else ""
    for step in range(done + 1, int(flags.get("max_steps", "2")) + 1):
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "pid": os.getpid()}) + "\n")
        if "fail" in flags:
            print("it went wrong: out of luck", file=sys.stderr)
            return int(flags["fail"])
        if "kill" in flags:
            os.kill(os.getpid(), signal.SIGKILL)
        if stopped:
            return 128 + stopped[0]
        time.sleep(0.02)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(f"{weights}<{folder.name} {flags.get('learning_rate')}")
    if "best" in flags:
        best = folder / f"checkpoint-{flags['best']}"
        best.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (best / name).write_text((folder / name).read_text())
        (folder / "best").unlink(missing_ok=True)
        (folder / "best").symlink_to(best.name)
    return 0


def main(arguments: list[str], calls: Path) -> int:
    with calls.open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    command, *rest = arguments
    words, flags = flags_of(rest)
    print(f"fake {command} begins")
    if command == "report":
        out = Path(flags["out"])
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.html").write_text(" ".join(words))
        return 0
    folder = Path(flags["output_dir"])
    if command == "eval":
        folder.mkdir(parents=True, exist_ok=True)
        model = (Path(words[0]) / "model.safetensors").read_text() if Path(words[0]).is_dir() else words[0]
        (folder / "model.math.json").write_text(json.dumps({"model": model, "k": flags.get("k")}))
        return 0
    return train(folder, flags)


if __name__ == "__main__":
    place, key, parent, _, *rest = sys.argv[1:]
    sys.exit(attend(Path(place), key, int(parent), lambda: main(rest, Path(place).parent / "calls.jsonl")))
