"""Laws of an evaluation through lm-eval from request to results, with lm-eval's part played by a stand-in."""

from __future__ import annotations

import json

import pytest

from psft.cli.main import main
from psft.evaluation.harness import runner


@pytest.fixture
def stand_in(monkeypatch, tiny_model_path, data_dir, tmp_path):
    """Runs tasks without lm-eval: item i of a task is right if i is even. Returns the names of the tasks it ran."""
    ran: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "require_lm_eval", lambda: "0.4.13")
    monkeypatch.setattr(runner, "packaged_folder", lambda task: None)
    monkeypatch.setattr(runner, "load_model", lambda arguments: object())

    def run_task(lm, model, task, place, settings, max_new_tokens=None):
        ran.append(task.task)
        if max_new_tokens == 13:
            raise KeyboardInterrupt
        n = task.limit or 4
        right = [float(i % 2 == 0) for i in range(n)]
        metric, _, name = (task.metric or "acc,none").partition(",")
        rows = [{"doc_id": i, "filter": name, metric: value, "doc_hash": str(i), "prompt_hash": str(i)}
                for i, value in enumerate(right)]  # fmt: skip
        rows += [{**row, "filter": "another", metric: 1 - row[metric]} for row in rows]
        return {
            "results": {task.task: {"alias": "x", f"{metric},{name}": sum(right) / n, f"{metric}_stderr,{name}": 0.25,
                                    "other,none": 0.125, "other_stderr,none": "N/A"}},
            "configs": {task.task: {"dataset_path": "json"}}, "versions": {task.task: 3.0}, "n-shot": {task.task: 5},
            "n-samples": {task.task: {"original": 20, "effective": n}}, "samples": {task.task: rows},
            "lm_eval_version": "0.4.13",
        }  # fmt: skip

    monkeypatch.setattr(runner, "run_task", run_task)
    return ran


@pytest.fixture
def evaluate(tiny_model_path, data_dir):
    def run(*more: str, suite: tuple[str, ...] = ("alignment-tax/truthfulqa",)) -> int:
        model = [] if more and not more[0].startswith("-") else [str(tiny_model_path)]
        return main(["eval", *model, *more, "--suite", *suite, "--data_dir", str(data_dir), "--any_rows"])

    return run


def results(tmp_path, name):
    return json.loads(next((tmp_path / "evals").glob(f"*/*.{name}.json")).read_text())


def test_results_have_the_form_of_ours(stand_in, evaluate, tmp_path, capsys):
    """Goes red if a field that report or eval.jsonl reads is missing, or the metric is another than the registered."""
    assert evaluate(suite=("alignment-tax/gsm8k@3", "alignment-tax/truthfulqa")) == 0
    content = results(tmp_path, "alignment-tax_gsm8k_3_alignment-tax_truthfulqa")
    first, second = content["benchmarks"]
    assert (first["benchmark"], first["n"], first["k"], first["data"]["limit"]) == ("gsm8k_cot", 3, 1, 3)
    assert first["accuracy"]["value"] == pytest.approx(2 / 3) and first["items"] == {"0": [1], "1": [0], "2": [1]}
    assert first["grader"]["metric"] == "exact_match,flexible-extract" and first["prompt"]["num_fewshot"] == 5
    assert second["harness"]["metrics"] == {
        "acc,none": {"value": 0.5, "stderr": 0.25}, "other,none": {"value": 0.125, "stderr": None},
    }  # fmt: skip
    assert second["data"]["rows"] == 20 and content["backend"]["name"] == "lm-eval/hf"
    shown = capsys.readouterr().out
    assert "TruthfulQA mc1" in shown and "50.0 ± 28.9" in shown and "other,none 12.5" in shown
    assert "mean of 2" in shown and "not the registered copy" in shown


def test_a_done_task_is_not_run_again(stand_in, evaluate, tmp_path, data_dir, tiny_model_path):
    """Goes red if anything that its numbers depend on is left out of the key, or a path or batch size is in it."""
    assert evaluate() == evaluate() == evaluate("--batch_size", "3") == 0
    assert stand_in == ["truthfulqa_mc1"]
    assert results(tmp_path, "alignment-tax_truthfulqa")["samples_made"] == 0
    for number, change in enumerate(
        (["--limit", "2"], ["--num_fewshot", "1"], ["--apply_chat_template"], ["--dtype", "bfloat16"],
         ["--max_new_tokens", "9"]), start=2,
    ):  # fmt: skip
        assert evaluate(*change) == evaluate(*change) == 0
        assert len(stand_in) == number, change
    path = data_dir / "truthfulqa/multiple_choice_hfschema.jsonl"
    path.write_text(path.read_text().replace("What is 3?", "What is three?"))
    assert evaluate() == 0 and len(stand_in) == 7


def test_a_stopped_evaluation_keeps_the_tasks_that_are_done(stand_in, evaluate, capsys):
    """Goes red if results are written at the end alone."""
    assert evaluate() == 0
    both = ("alignment-tax/truthfulqa", "alignment-tax/gsm8k")
    assert evaluate("--max_new_tokens", "13", suite=both) == 130
    assert "answers so far are kept" in capsys.readouterr().err
    assert evaluate(suite=both) == 0
    assert stand_in.count("gsm8k_cot") == 1 and stand_in.count("truthfulqa_mc1") == 2


def test_a_checkpoint_gets_its_rows_and_models_are_paired(stand_in, evaluate, tmp_path, capsys):
    """Goes red if a metric is lost, a row stands twice, or items of two models are not matched."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    more = ("--run_dir", str(run), "--step", "0")
    assert evaluate(*more) == evaluate(*more) == 0
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [(row["metric"], row["value"], row["n"], row["step"]) for row in rows] == [
        ("accuracy", 0.5, 4, 0), ("other,none", 0.125, 4, 0),
    ]  # fmt: skip
    before = next((tmp_path / "evals").glob("*/*.json"))
    assert evaluate("--compare_to", str(before)) == 0
    assert "+0.0 points against the other model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--temperature", "0.5", "--seed", "3"], "--temperature, --seed has no effect there"),
        (["--k", "2"], "--k has no effect"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--backend", "openai", "--base_url", "http://localhost:1/v1"], "log-probabilities"),
    ],
)
def test_settings_without_effect_are_refused(stand_in, evaluate, capsys, more, said):
    """Goes red if one is ignored."""
    assert evaluate(*more) == 2 and said in capsys.readouterr().err and not stand_in


def test_harness_settings_without_a_task_are_refused(evaluate, capsys):
    """Goes red if --num_fewshot is taken, and ignored, for a suite of ours."""
    assert evaluate("--num_fewshot", "3", suite=("aime24",)) == 2
    assert "--num_fewshot has no effect without alignment-tax" in capsys.readouterr().err


def test_absent_data_say_how_to_get_them(stand_in, evaluate, data_dir, capsys):
    """Goes red if only the first is named, if something is run, or a task without local data passes as one with."""
    (data_dir / "gpqa/gpqa_main.csv").unlink()
    assert evaluate(suite=("alignment-tax", "harness:hellaswag")) == 2
    said = capsys.readouterr().err
    assert "gpqa/gpqa_main.csv: not in" in said and "accept the terms" in said and "add --download" in said
    assert not stand_in
    assert evaluate("--skip_missing", suite=("alignment-tax",)) == 0
    assert len(stand_in) == 4 and "left out: GPQA main" in capsys.readouterr().err


def test_a_missing_lm_eval_says_how_to_install_it(evaluate, monkeypatch, capsys):
    """Goes red if Python's ImportError is what says it, or an old version is taken."""
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    assert evaluate() == 2
    assert 'pip install "psft[eval]"' in capsys.readouterr().err
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(runner.importlib.metadata, "version", lambda name: "0.4.9.2")
    assert evaluate() == 2
    assert "lm-eval 0.4.9.2 is too old, 0.4.13 or later" in capsys.readouterr().err
