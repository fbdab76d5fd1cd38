"""A hundred long runs at once: how time, memory and the page grow, and the bounds of the whole (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reports.read_page import Page

from psft.runs import RunFolder

MEASURE = """
import json, resource, sys, time
from pathlib import Path
from psft.reports import find_runs, write_report
started = time.monotonic()
written = write_report(find_runs([sys.argv[1]]), Path(sys.argv[2]), images=sys.argv[3] == "images")
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "wall_s": time.monotonic() - started, "cpu_s": used.ru_utime + used.ru_stime, "memory_mb": used.ru_maxrss / 1024,
    "page_mb": written.page.stat().st_size / 1e6, "steps": sum(run.num_steps for run in written.runs),
}))
"""


def make_runs(root: Path, num_runs: int, num_steps: int) -> None:
    """Runs of as many settings; their metrics are links to three files, so that they take no room on the disk."""
    numbers = np.random.default_rng(0)
    names = ("loss", "nll", "entropy", "clip_fraction", "clippable_fraction", "gradient_kept", "log_ratio_abs_max",
             "log_ratio_mean", "token_weight", "mean_token_accuracy", "tokens_per_second")  # fmt: skip
    for base in range(3):
        values = numbers.random((num_steps, len(names))).tolist()
        counts = numbers.integers(0, 9999, (num_steps, 15)).tolist()
        norms = (1 + 0.2 * numbers.random(num_steps)).tolist()
        with open(root / f"base{base}.jsonl", "w") as file:
            for i in range(num_steps):
                row = {
                    "step": i + 1, "stage": "train", "window": i // 8, "mini_batch": i % 8 + 1, "num_mini_batches": 8,
                    "epsilon_high": 0.28, "epoch": (i + 1) * 10 / num_steps, "tokens": 30_000,
                    **dict(zip(names, values[i], strict=True)), "log_ratio_histogram": counts[i],
                    "grad_norm": norms[i], "learning_rate": 1e-6, "peak_memory_bytes": 2**33,
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
    for i in range(num_runs):
        folder = RunFolder(root / f"run{i:03d}")
        objective = {"name": "psft", "settings": {"epsilon_high": 0.28}}
        config = {"learning_rate": 1e-6 * (i + 1), **{f"setting_{j}": j for j in range(150)}}
        folder.write_json("run.json", {"command": ["psft", "train", "r"], "objective": objective, "config": config})
        os.symlink(root / f"base{i % 3}.jsonl", folder.path / "metrics.jsonl")
        for at in range(0, num_steps + 1, max(1, num_steps // 40)):
            row = {
                "step": at,
                "benchmark": "h",
                "metric": "nll",
                "k": None,
                "value": 1 - at / num_steps,
                "stderr": 0.01,
            }
            folder.append("eval.jsonl", row)
            drift = {"step": at, "group": "all", "drift_nats_per_token": 0.01, "stderr": 0.001}
            folder.append("probe.jsonl", drift)
        folder.write_json("summary.json", {"exit_reason": "finished", "steps": num_steps, "wall_time_s": 9})


def report(root: Path, out: Path, images: str = "") -> dict[str, float]:
    """Time (wall and processor), memory and size of one report, made by a process of its own."""
    source = Path(__file__).resolve().parents[2] / "src"
    words = [sys.executable, "-W", "ignore", "-c", MEASURE, str(root), str(out), images]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_does_not_grow_with_the_steps(tmp_path):
    """Ten times the steps, the page at most a third larger. Goes red if every point is written."""
    sizes = []
    for num_steps in (2000, 20_000):
        root = tmp_path / str(num_steps)
        root.mkdir()
        make_runs(root, 3, num_steps)
        used = report(root, root / "out")
        assert used["steps"] == 3 * num_steps
        sizes.append(used["page_mb"])
    assert sizes[1] < 1.33 * sizes[0] < 4


def test_more_runs_share_the_points(tmp_path):
    """Eight times the runs, the page at most three times as large. Goes red if each run has a budget of its own."""
    sizes, points = [], []
    for num_runs in (4, 32):
        root = tmp_path / str(num_runs)
        root.mkdir()
        make_runs(root, num_runs, 1500)
        sizes.append(report(root, root / "out")["page_mb"])
        lines = Page(root / "out" / "index.html").data["figures"]["entropy"]["charts"][0]["lines"]
        points.append(len(lines[0]["x"]))
    assert sizes[1] < 3 * sizes[0] and points[1] < points[0] / 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_runs_of_twenty_thousand_steps(tmp_path):
    """Tables and page within 30 s of two processors (60 s of processor time: a shared machine's clock says nothing) and
    1 GB, the page within 10 MB; with image files within 1 GB, too. Goes red if rows are read one by one as dicts."""
    make_runs(tmp_path, 100, 20_000)
    used = report(tmp_path, tmp_path / "out")
    print(used)
    assert used["steps"] == 2_000_000 and used["page_mb"] < 10 and used["memory_mb"] < 1000 and used["cpu_s"] < 60
    with_images = report(tmp_path, tmp_path / "out", "images")
    print(with_images)
    assert with_images["memory_mb"] < 1000 and with_images["cpu_s"] < 90
