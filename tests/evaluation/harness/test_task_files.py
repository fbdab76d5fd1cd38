"""Laws of the task files: lm-eval loads them, and they differ from its own in the data alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from psft.errors import RequestError
from psft.evaluation.harness.data import find_file, prepare
from psft.evaluation.harness.registry import TABLE_11, choose_tasks
from psft.evaluation.harness.runner import packaged_folder
from psft.evaluation.harness.task_files import mend, write_task_files

DATA_KEYS = {"dataset_path", "dataset_name", "dataset_kwargs", "process_docs", "num_fewshot", "metadata"}


def write(name, data_dir, place, **more):
    (task,) = choose_tasks([name])
    data = prepare(task, find_file(task, data_dir), any_rows=True)
    write_task_files(
        place, task.task, packaged=packaged_folder(task), files=data.files, default_num_fewshot=task.num_fewshot, **more
    )
    return task


def load(place: Path, name: str):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(place), include_defaults=False).load([name])


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    """lm-eval, with datasets' cache in a folder of the test."""
    module = pytest.importorskip("lm_eval", reason="loads lm-eval, of the extra eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return module


def without_function(value: object) -> str:
    """As text; GPQA's shuffle, which its examples go through too, is the one thing left out on purpose."""
    return re.sub(r"process_docs=[^,]*", "", str(value))


@pytest.mark.parametrize("short", [task.short for task in TABLE_11])
def test_lm_eval_loads_them_and_only_the_data_differ(lm_eval, data_dir, tmp_path, short):
    """Goes red if a key beside the data's is dropped or changed, or a split points nowhere."""
    from lm_eval.config.task import TaskConfig
    from lm_eval.tasks._yaml_loader import load_yaml

    task = write(f"alignment-tax/{short}", data_dir, tmp_path / "tasks")
    loaded = load(tmp_path / "tasks", task.task)
    packaged = {path.stem: path for path in packaged_folder(task).glob("*.yaml")}
    own = {load_yaml(path, resolve_func=False).get("task"): path for path in packaged.values() if path.stem[0] != "_"}
    assert len(loaded["tasks"]) == (3 if short in ("mmlu", "cmmlu") else 1)
    for name, made in loaded["tasks"].items():
        theirs = {k: v for k, v in load_yaml(own[name]).items() if k not in ("tag", "group")}
        expected = vars(TaskConfig(**theirs))
        for key, value in vars(made.config).items():
            if key not in DATA_KEYS and not callable(value):
                assert without_function(value) == without_function(expected[key]), key
        shots = theirs.get("num_fewshot")
        assert made.config.num_fewshot == (5 if shots is None else shots)
        assert len(made.eval_docs) > 0


def test_prompts_are_right(lm_eval, data_dir, tmp_path):
    """By hand from the packaged template. Goes red if examples come from the test split, or choices are shifted."""
    write("alignment-tax/mmlu", data_dir, tmp_path / "tasks", num_fewshot=1)
    task = load(tmp_path / "tasks", "mmlu_flan_n_shot_generative")["tasks"]["mmlu_flan_n_shot_generative_virology"]
    task.set_fewshot_seed(1234)
    context = task.fewshot_context(task.eval_docs[1], num_fewshot=task.config.num_fewshot)
    assert context == (
        "The following are multiple choice questions (with answers) about virology.\n\n"
        'Q: virology dev 0,\n"really"?\n(A) 1 (B) 2 (C) None (D) 4\nA: (A)\n\n'
        'Q: virology test 1,\n"really"?\n(A) 1 (B) 2 (C) None (D) 4\nA:'
    )


def test_a_single_subject_and_a_part_are_written(lm_eval, data_dir, tmp_path):
    """Goes red if a subject of a group, or a tag over some of them, is not found by lm-eval's name."""
    write("harness:cmmlu_virology", data_dir, tmp_path / "a")
    assert list(load(tmp_path / "a", "cmmlu_virology")["tasks"]) == ["cmmlu_virology"]
    write("harness:mmlu_flan_n_shot_generative_stem", data_dir, tmp_path / "b")
    found = load(tmp_path / "b", "mmlu_flan_n_shot_generative_stem")["tasks"]
    assert sorted(name.rpartition("_")[2] for name in found) == ["anatomy", "astronomy"]


def test_requests_it_cannot_meet_are_refused(lm_eval, data_dir, tmp_path):
    """Goes red if lm-eval's own assertion, deep in a run, is what says it."""
    with pytest.raises(RequestError, match="6 examples are to be shown, there are 5"):
        write("alignment-tax/cmmlu", data_dir, tmp_path, num_fewshot=6)
    with pytest.raises(RequestError, match="9 examples are to be shown, there are 8"):
        write("alignment-tax/gsm8k", data_dir, tmp_path, num_fewshot=9)
    with pytest.raises(RequestError, match="20 examples are to be shown, there are 19"):
        write("alignment-tax/gpqa", data_dir, tmp_path, num_fewshot=20)
    with pytest.raises(RequestError, match="no task cmmlu_alchemy"):
        write("harness:cmmlu_alchemy", data_dir, tmp_path)


def test_mending_touches_only_groups_without_a_score():
    """Goes red if a group that works is changed, or a subgroup is forgotten."""
    leaves = [{"metric_list": [{"metric": "exact_match"}]}]
    broken = [{"metric": "acc", "weight_by_size": True}]
    group = {
        "group": "g", "task": [{"group": "s", "task": ["t"], "aggregate_metric_list": broken}, "t"],
        "aggregate_metric_list": broken,
    }  # fmt: skip
    fixed = [{"metric": "exact_match", "weight_by_size": True}]
    made = mend(group, leaves)
    assert made["aggregate_metric_list"] == fixed and made["task"][0]["aggregate_metric_list"] == fixed
    assert made["task"][1] == "t" and group["aggregate_metric_list"] is broken
    assert mend(group, [{"metric_list": [{"metric": "acc"}]}]) == group
