"""`psft run` and `psft plan` of pipelines through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psft import recipes
from psft.cli import check_stages
from psft.cli.check_stages import problem_of
from psft.cli.main import main
from psft.cli.run import parse
from psft.errors import RequestError

PIPELINES = [name for name in recipes.names() if name.startswith("pipeline-")]


def test_options_are_read_wherever_they_stand() -> None:
    """Goes red if an option is lost, or --redo takes the pipeline's name for a stage."""
    request = parse(["p.yaml", "--redo", "a", "b,c", "--output-dir=x", "--num_processes", "2", "--dry_run"])
    assert request.pipeline == "p.yaml" and request.redo == ("a", "b", "c") and request.dry_run
    assert request.output_dir == Path("x") and request.launch == {"num_processes": "2"}
    assert parse(["--from", "a", "p.yaml"]).first == "a"
    for words, message in (
        ([], "name one pipeline"),
        (["p", "q"], "name one pipeline"),
        (["p", "--only"], "--only needs a value"),
        (["p", "--resume"], "unknown option --resume"),
    ):
        with pytest.raises(RequestError, match=message):
            parse(words)


def test_a_pipeline_is_named_where_another_command_meets_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Goes red if `psft train pipeline-...` speaks of unknown settings."""
    assert main(["train", "pipeline-quickstart-grpo"]) == 2
    assert "is a pipeline. Run: psft run pipeline-quickstart-grpo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quickstart", "--max_stps=3"], "Did you mean --max_steps"),
        (["train", "quickstart", "--objective=sft", "--epsilon_high=1"], "epsilon_high"),
        (["train", "quickstart", "--dataset=nowhere.jsonl"], "no data file nowhere.jsonl"),
        (["train", "quickstart", "--model_name_or_path=./nowhere"], "no model folder ./nowhere"),
        (["grpo", "grpo-quickstart", '--rewards={"maths": 1}'], "maths"),
        (["grpo", "grpo-quickstart", "--use_vllm=true"], "vLLM, which is not installed"),
        (["dpo", "dpo-quickstart"], "--dataset is missing"),
        (["eval", "smollm2-135m-instruct", "--suite=maths"], "Did you mean math"),
        (["eval", "smollm2-135m-instruct", "--suite=aime24"], "AIME24: math/aime24.jsonl: no --data_dir was given"),
        (["eval", "./nowhere", "--suite=quickstart"], "no model folder ./nowhere"),
        (["report", "nowhere", "--out=x"], "no run folder nowhere"),
        (["report", "made", "--basis=x"], "unknown option --basis"),
    ],
)
def test_what_a_command_would_refuse_is_known_before_anything_runs(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if one of these would show only after the stages before it."""
    monkeypatch.delenv("PSFT_DATA_DIR", raising=False)
    problem = problem_of(arguments, ["made"])
    assert problem is not None and message in problem


def test_what_earlier_stages_make_is_not_missed() -> None:
    """Goes red if a stage is refused because its start is not there yet."""
    made = ["out/a", "out/b"]
    assert problem_of(["train", "quickstart", "--model_name_or_path=out/a", "--output_dir=out/b"], made) is None
    words = ["eval", "out/a/checkpoint-3", "--suite=quickstart", "--run_dir=out/a", "--step=0", "--output_dir=out/c"]
    assert problem_of(words, made) is None
    assert problem_of(["report", "out/a", "out/b", "--out=out/r"], made) is None


def test_wrong_settings_of_all_stages_are_told_together_and_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goes red if the first stage runs although the last is wrong."""
    path = tmp_path / "p.yaml"
    path.write_text(
        "pipeline: p\nstages:\n"
        "- {name: a, command: train, recipe: quickstart, settings: {max_stps: 3}}\n"
        "- {name: b, command: eval, model: '${a.model}', settings: {suite: quickstart, kk: 4}}\n"
    )
    assert main(["run", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert (
        "stage a: unknown option --max_stps. Did you mean --max_steps" in told
        and "stage b: unknown option --kk" in told
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_start_for_a_later_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Goes red if that shows after the training."""
    path = tmp_path / "p.yaml"
    path.write_text(
        "pipeline: p\nstages:\n"
        "- {name: a, command: train, recipe: quickstart, settings: {use_peft: true}}\n"
        "- {name: b, command: eval, model: '${a.model}', settings: {suite: quickstart}}\n"
    )
    assert main(["run", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "${a.model} is a LoRA adapter" in capsys.readouterr().err


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_can_be_planned(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if a stage of it would be refused, is left out, or is planned without sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSFT_DATA_DIR", raising=False)
    assert main(["plan", name]) == 0
    told = capsys.readouterr().out
    entries: list[dict[str, Any]] = recipes.load_recipe(name)["stages"]
    for number, entry in enumerate(entries, start=1):
        assert f"[{number}/{len(entries)}] {entry['name']}: psft {entry['command']}" in told
    assert (
        "no estimate" not in told
        and "will refuse" not in told
        and "downloads it\n" not in told.split("psft-scores")[-1]
    )
    total = told.rpartition("Total")[2]
    trained = [entry["name"] for entry in entries if entry["command"] in ("train", "dpo")]
    assert all(f"{name} " in total for name in trained) and "H100" in total
    assert list(tmp_path.iterdir()) == []


def test_a_plan_names_the_stage_that_would_be_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Goes red if one wrong stage hides the others, or passes."""
    path = tmp_path / "p.yaml"
    path.write_text(
        "pipeline: p\nstages:\n"
        "- {name: a, command: train, recipe: quickstart, settings: {mini_batch_size: 5}}\n"
        "- {name: b, command: eval, model: '${a.model}', settings: {suite: quickstart}}\n"
    )
    assert main(["plan", str(path)]) == 2
    captured = capsys.readouterr()
    assert "stage a:" in captured.err and "[2/2] b: psft eval" in captured.out


def test_a_dry_run_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if it makes a folder, or the command lines are not those that would run."""
    monkeypatch.setattr(check_stages, "check_stages", lambda executor, stages: None)  # asked in the test above
    out = tmp_path / "out"
    assert main(["run", "pipeline-quickstart-dpo", "--dry_run", "--output_dir", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"psft dpo dpo-quickstart --model_name_or_path={out / 'psft'} '--dataset=reasoning-gym-pairs:" in told
    assert f"psft report {out / 'psft'} {out / 'dpo'} --base=" in told and "[6/6] report: run: not begun" in told
    assert not out.exists()


def _with_few_steps(name: str, folder: Path) -> Path:
    import yaml

    content = recipes.load_recipe(name)
    few: dict[str, dict[str, Any]] = {
        "psft": {"max_steps": 2, "train_batch_size": 8, "eval_dataset": None},
        "grpo": {"max_steps": 1},
        "dpo": {"max_steps": 2, "max_rows": 8},
    }
    content["shared"]["eval"] |= {"limit": 4, "max_new_tokens": 16}
    for stage in content["stages"]:
        if stage["name"] in few:
            stage["settings"] = {**stage["settings"], **few[stage["name"]], "probe_every": 0}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["pipeline-quickstart-grpo", "pipeline-quickstart-dpo"])
def test_the_quick_start_pipelines_run_from_end_to_end(name: str, tmp_path: Path) -> None:
    """The real model and data, fewer steps. Goes red if a stage does not start from what the one before has left, a
    score is missing, or the same command does anything again."""
    from psft.models.quickstart import NAME
    from psft.models.resolve import local_folder

    if local_folder(NAME) is None:
        pytest.skip("the quick-start model is not in the cache: psft quickstart builds it")
    path, out = _with_few_steps(name, tmp_path), tmp_path / "out"
    second = name.rpartition("-")[2]
    assert main(["run", str(path), "--output_dir", str(out)]) == 0
    state = json.loads((out / "pipeline.json").read_text())["stages"]
    assert [entry["status"] for entry in state.values()] == ["done"] * 6
    assert f"--model_name_or_path={out / 'psft'}" in state[second]["command"]
    for stage in ("base", "psft-scores", f"{second}-scores"):
        found = json.loads((out / state[stage]["outputs"]["results"]).read_text())["benchmarks"]
        assert [entry["n"] for entry in found] == [4, 4] and not any(entry["missing_samples"] for entry in found)
    page = (out / "report" / "index.html").read_text()
    assert "psft" in page and second in page
    before = {item: item.stat().st_mtime_ns for item in out.rglob("*.safetensors")}
    assert main(["run", str(path), "--output_dir", str(out)]) == 0
    assert {item: item.stat().st_mtime_ns for item in out.rglob("*.safetensors")} == before
    assert all(entry["attempts"] == 1 for entry in json.loads((out / "pipeline.json").read_text())["stages"].values())
