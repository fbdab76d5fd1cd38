"""lm-eval itself on tiny data: what it says is what we write, and equals what its own command says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from psft.cli.main import main

pytest.importorskip("lm_eval", reason="runs lm-eval, of the extra eval")


@pytest.fixture
def evaluate(tiny_model_path, data_dir, tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def run(*suite: str, more: tuple[str, ...] = (), out: str = "out", code: int = 0) -> dict:
        request = ["eval", str(tiny_model_path), "--suite", *suite, "--data_dir", str(data_dir), "--any_rows"]
        assert main([*request, "--device", "cpu", "--output_dir", out, *more]) == code
        return json.loads(next((tmp_path / out).glob("*.json")).read_text()) if code == 0 else {}

    return run


def test_the_group_has_the_score_it_lacks_in_lm_eval(evaluate, tmp_path):
    """3, 5 and 2 items, so that means over subjects and over items differ. Goes red without `mend`."""
    (found,) = evaluate("alignment-tax/mmlu", more=("--max_new_tokens", "8", "--num_fewshot", "0"))["benchmarks"]
    parts = found["harness"]["subtasks"]
    assert len(parts) == 3 and found["n"] == 10 and len(found["items"]) == 10 and "virology/1" in found["items"]
    sizes = {"anatomy": 3, "astronomy": 5, "virology": 2}
    for metric in ("exact_match,strict-match", "exact_match,flexible-extract"):
        by_hand = (
            sum(parts[f"mmlu_flan_n_shot_generative_{name}"][metric]["value"] * n for name, n in sizes.items()) / 10
        )
        assert found["harness"]["metrics"][metric]["value"] == pytest.approx(by_hand, abs=1e-12)
        assert found["harness"]["metrics"][metric]["stderr"] is not None
    place = tmp_path / "out" / found["harness"]["files"]
    assert len(list(place.glob("results_*.json"))) == 1 and len(list(place.glob("samples_*.jsonl"))) == 3
    assert not list(place.glob("*.db"))


def test_every_task_of_the_table_runs(evaluate):
    """Two items each. Goes red if a task's data have not the form it reads."""
    more = ("--limit", "2", "--num_fewshot", "1", "--max_new_tokens", "4")
    found = evaluate("alignment-tax", more=more)["benchmarks"]
    assert [(one["benchmark"], one["n"], one["prompt"]["num_fewshot"]) for one in found] == [
        ("gsm8k_cot", 2, 1), ("mmlu_flan_n_shot_generative", 6, 1), ("truthfulqa_mc1", 2, 0), ("cmmlu", 6, 1),
        ("gpqa_main_cot_n_shot", 2, 1),
    ]  # fmt: skip
    assert all("accuracy" in one for one in found)


def test_a_killed_task_goes_on_where_it_was(evaluate, tmp_path, monkeypatch):
    """Stopped in the third of four batches. Goes red if answers are kept at the end alone."""
    from lm_eval.models.huggingface import HFLM

    calls: list[int] = []
    forward = HFLM._model_call

    def counted(self, inps, *args, **kwargs):
        calls.append(len(inps))
        if len(calls) == 3:
            raise MemoryError("pulled the plug")
        return forward(self, inps, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    evaluate("alignment-tax/truthfulqa", more=("--batch_size", "4"), code=1)
    assert calls == [4, 4, 4]
    (resumed,) = evaluate("alignment-tax/truthfulqa", more=("--batch_size", "4"))["benchmarks"]
    assert sum(calls[3:]) == 15 - 8
    (whole,) = evaluate("alignment-tax/truthfulqa", out="fresh")["benchmarks"]
    assert resumed["items"] == whole["items"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["truthfulqa", "mmlu"])
def test_the_number_is_that_of_lm_evals_own_command(evaluate, tiny_model_path, tmp_path, name):
    """The same task files, another process. Goes red if seeds, dtype, few-shot count or chat template differ."""
    more = ("--limit", "3", "--max_new_tokens", "8")
    (ours,) = evaluate(f"alignment-tax/{name}", more=more)["benchmarks"]
    place = tmp_path / "out" / ours["harness"]["files"]
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={tiny_model_path},dtype=float32", "--device", "cpu", "--batch_size", "8", "--limit", "3",
        "--include_path", str(place / "tasks"), "--tasks", ours["benchmark"],
        "--output_path", str(tmp_path / "theirs.json"),
        "--log_samples", "--gen_kwargs", "max_gen_toks=8",
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next(tmp_path.glob("theirs_*.json")).read_text())
    mine = json.loads(next(place.glob("results_*.json")).read_text())
    assert mine["results"] == theirs["results"] and mine["task_hashes"] == theirs["task_hashes"]
    for metric, entry in ours["harness"]["metrics"].items():
        assert entry["value"] == theirs["results"][ours["benchmark"]][metric]
