"""An evaluation that is killed again and again ends with the samples of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_change_no_sample(tiny_model_path, tmp_path):
    """SIGKILL at a random moment after some new sample, ten times. Goes red if batches are cut over what is missing, if
    the seed is drawn as work goes on, or if a torn line is not cut.
    """
    rows = [
        {"id": i, "q": f"How many clips are {i} clips{' and more' * (i % 7)}?", "o": ["one", "two"], "a": i % 2}
        for i in range(40)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(
        "benchmarks:\n  clips:\n    {kind: choice, file: items.jsonl, k: 4, template: '{question} {options}',\n"
        "     sampling: {temperature: 1.0, max_tokens: 150},\n"
        "     fields: {id: id, question: q, options: o, gold_index: a}}\n"
    )

    def start(out):
        words = ["eval", str(tiny_model_path), "--suite", "suite.yaml", "--batch_size", "4", "--output_dir", out]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "psft.cli.main", *words]
        return subprocess.Popen(command, cwd=tmp_path, env=one_thread, stderr=subprocess.DEVNULL)

    def samples(out):
        path = tmp_path / out / "samples.jsonl"
        return path.read_bytes() if path.exists() else b""

    assert start("whole").wait(600) == 0
    generator = random.Random(0)
    for _ in range(10):
        before = len(samples("killed"))
        process = start("killed")
        while len(samples("killed")) == before and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed: give it more to do"
        time.sleep(generator.random() * 0.4)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    assert b"\n" in samples("killed") and len(samples("killed")) < len(samples("whole"))
    assert start("killed").wait(600) == 0
    assert len(samples("whole").splitlines()) == 160
    assert sorted(samples("killed").splitlines()) == sorted(samples("whole").splitlines())
    results = [
        json.loads((tmp_path / out / f"{tiny_model_path.name}.suite.json").read_text()) for out in ("whole", "killed")
    ]
    assert results[0]["benchmarks"] == results[1]["benchmarks"]
