"""Two processes, each with the whole model (DDP) or with half of it (FSDP2), train what one trains, and resume exactly.

Weights are float64 where one process is held against two: in float32 the order of a sum alone moves a gradient norm by
some 1e-6 of itself. The configuration files are the ones psft ships.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from psft.accelerate import config_file

SCRIPT = Path(__file__).with_name("train_runs.py")
ENGINES = ("ddp", "fsdp2")
SAME = {"psft": {}, "sft_kl": {"objective": "sft_kl"}}
"""Runs of 12 steps, three windows: held against one process."""
RESUMED = {"psft": 6, "sft_kl-k3": 9}
"""Runs that are cut and resumed, and the step of the checkpoint: 2 of 4 mini-batches into a window, and 1 of 4."""
TIMINGS = {"tokens_per_second", "peak_memory_bytes"}


def start(folder, model, rows, engine, runs):
    """Train `runs` in folder/engine: in one process, or in two that `engine` joins."""
    where = folder / engine
    where.mkdir()
    (where / "runs.json").write_text(json.dumps(runs))
    launcher = [] if engine == "one" else [
        "-m", "accelerate.commands.launch", "--config_file", str(config_file(engine)), "--num_processes", "2",
    ]  # fmt: skip
    command = [sys.executable, *launcher, str(SCRIPT), str(model), str(rows), str(where), str(where / "runs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


def of_resume(name, step, folder):
    settings = {"save_strategy": "steps", "save_steps": 3, **({"ref_cache_dir": str(folder)} if "k3" in name else {})}
    settings |= {"objective": "sft_kl", "kl_estimator": "k3"} if "k3" in name else {}
    return {f"whole-{name}": settings, f"cut-{name}": {**settings, "cut_of": [f"whole-{name}", step]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_path):
    """FOLDER/ENGINE/RUN for every run."""
    folder = tmp_path_factory.mktemp("processes")
    generator = torch.Generator().manual_seed(1)
    data = []
    for _ in range(32):
        prompt = int(torch.randint(2, 9, (), generator=generator))
        ids = torch.randint(3, 400, (prompt + int(torch.randint(1, 24, (), generator=generator)),), generator=generator)
        data.append({"input_ids": ids.tolist(), "labels": [-100] * prompt + ids.tolist()[prompt:]})
    (folder / "rows.json").write_text(json.dumps(data))
    same = {name: {**settings, "float64": True} for name, settings in SAME.items()}
    start(folder, tiny_model_path, folder / "rows.json", "one", same)
    for engine in ENGINES:
        runs = dict(same)
        for name, step in RESUMED.items():
            runs |= of_resume(name, step, folder / f"{engine}-cache")
        start(folder, tiny_model_path, folder / "rows.json", engine, runs)
    return folder


def rows_of(path, name="metrics.jsonl"):
    rows = [json.loads(line) for line in (path / name).open()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def facts_of(path):
    return json.loads((path / "facts.json").read_text())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("run", SAME)
def test_two_processes_have_the_losses_and_gradients_of_one_to_a_millionth(folder, engine, run):
    """Goes red if a rank divides by its own tokens, an empty micro-batch counts, or its gradient is not summed."""
    one, two = folder / "one" / run, folder / engine / run
    assert facts_of(two)["model"] == {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}[engine]
    single, double = rows_of(one), rows_of(two)
    assert len(single) == len(double) == 12 and single[-1]["window"] == 2
    for a, b in zip(single, double, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, float):
                assert b[name] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, a, b)
            else:
                assert b[name] == value, (name, a, b)
    held_out, again = rows_of(one, "eval.jsonl"), rows_of(two, "eval.jsonl")
    assert len(held_out) == len(again) == 6
    for a, b in zip(held_out, again, strict=True):
        assert b["n"] == a["n"] and b["value"] == pytest.approx(a["value"], rel=1e-6), (a, b)
    assert facts_of(two)["train_loss"] == pytest.approx(facts_of(one)["train_loss"], rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_whose_micro_batches_differ_in_number_stay_in_step(folder, engine):
    """That they did is the test above; this one holds that there was a difference, on either side.

    Goes red if the rows or the cap are such that no rank ever waits for another.
    """
    counts = [json.loads((folder / engine / "psft" / f"counts-{rank}.json").read_text()) for rank in (0, 1)]
    differences = {first - second for first, second in zip(*counts, strict=True)}
    assert min(differences) < 0 < max(differences), counts


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("run", RESUMED)
def test_two_processes_resume_to_the_same_bits(folder, engine, run):
    """Goes red if a rank takes up another's old log-probs, moments or random state, or if any of them is lost."""
    whole, cut = folder / engine / f"whole-{run}", folder / engine / f"cut-{run}"
    assert json.loads((cut / "run.json").read_text())["resumed"][0]["step"] == RESUMED[run]
    assert rows_of(cut) == rows_of(whole) and rows_of(cut, "eval.jsonl") == rows_of(whole, "eval.jsonl")
    one, other = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
