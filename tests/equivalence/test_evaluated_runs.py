"""Two processes evaluate while they train what one evaluates, with whole models (DDP) and halves (FSDP2)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from psft.accelerate import config_file

SCRIPT = Path(__file__).with_name("evaluated_runs.py")
SUITE = """
defaults: {kind: choice, file: items.jsonl, template: "{question} {options}"}
benchmarks:
  greedy: {k: 1, fields: &f {id: id, question: q, options: o, gold_index: a}, sampling: {preset: greedy, max_tokens: 7}}
  drawn: {k: 3, fields: *f, sampling: {temperature: 1.0, max_tokens: 5}}
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_path):
    """trained(engine) -> folder of the runs of evaluated_runs.py, in one process or in two; each started once."""
    folder = tmp_path_factory.mktemp("evaluated")
    items = [{"id": f"q{i}", "q": "clips " * (1 + 2 * i), "o": ["robe", "fiber"], "a": 0} for i in range(7)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "suite.yaml").write_text(SUITE)
    ids = torch.randint(3, 400, (16, 24), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "rows.json").write_text(json.dumps([{"input_ids": i, "labels": [-100] * 4 + i[4:]} for i in ids]))

    def make(engine):
        where = folder / engine
        if not where.exists():
            where.mkdir()
            launcher = [] if engine == "one" else [
                "-m", "accelerate.commands.launch", "--config_file", str(config_file(engine)), "--num_processes", "2",
            ]  # fmt: skip
            words = [str(tiny_model_path), str(folder / "rows.json"), str(folder / "suite.yaml"), str(where)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            done = subprocess.run(
                [sys.executable, *launcher, str(SCRIPT), *words],
                env=environment, capture_output=True, text=True, timeout=900,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
        return where

    return make


def samples(run, step, benchmark):
    lines = (run / "evaluation" / f"step-{step}" / "samples.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["benchmark"] == benchmark]
    return {(row["item"], row["index"]): row["response"] for row in rows}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("run", ["with", "lora"])
def test_two_processes_give_the_answers_of_one(engine, run, trained):
    """Greedy answers at step 0, at equal weights; later every sample once. Goes red if a rank's answers are lost or
    doubled, if ranks fall out of step, or if parts of a model are called as if they were all."""
    one, two = trained("one") / run, trained(engine) / run
    assert samples(two, 0, "greedy") == samples(one, 0, "greedy") and any(samples(two, 0, "greedy").values())
    for step in (0, 2, 4):
        assert len(samples(two, step, "greedy")) == 7 and len(samples(two, step, "drawn")) == 21
        lines = (two / "evaluation" / f"step-{step}" / "samples.jsonl").read_text().splitlines()
        assert len(lines) == 28
    rows = [json.loads(line) for line in (two / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["benchmark"] == "greedy"] == [0, 2, 4]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_do_not_notice_by_a_bit(engine, trained):
    """Goes red if generating leaves a shard gathered, a random state moved on one rank, or a module in eval mode."""
    folder = trained(engine)
    with_it, without = (load_file(folder / name / "model.safetensors") for name in ("with", "without"))
    assert with_it.keys() == without.keys() and all(torch.equal(with_it[name], without[name]) for name in with_it)
    assert os.readlink(folder / "with" / "best") in ("checkpoint-2", "checkpoint-4")
    known = [json.loads((folder / "with" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert known[0] == known[1] and known[0]["step"] is not None
