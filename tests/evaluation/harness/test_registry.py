"""Laws of the names that go to lm-evaluation-harness."""

import pytest

from psft.errors import RequestError
from psft.evaluation.harness.registry import choose_tasks, split_names


def test_names_are_parted():
    """Goes red if a suite that only begins like ours is taken, or a name with @N is not."""
    names = ["math", "alignment-tax", "alignment-tax/mmlu@3", "alignment-taxes.yaml", "harness:x", "alignment-tax@2"]
    assert split_names(names) == (["math", "alignment-taxes.yaml"], [names[1], names[2], names[4], names[5]])


def test_the_suite_is_table_11():
    """Goes red if a task is missing, or --limit or @N does not reach it."""
    assert [task.task for task in choose_tasks(["alignment-tax"])] == [
        "gsm8k_cot", "mmlu_flan_n_shot_generative", "truthfulqa_mc1", "cmmlu", "gpqa_main_cot_n_shot",
    ]  # fmt: skip
    found = choose_tasks(["alignment-tax/gsm8k", "harness:cmmlu_virology@4", "harness:hellaswag"], 9)
    assert [(task.task, task.limit) for task in found] == [("gsm8k_cot", 9), ("cmmlu_virology", 4), ("hellaswag", 9)]
    assert found[1].file == "cmmlu/cmmlu.zip" and found[1].num_fewshot == 5 and found[2].file is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["alignment-tax/mmul"], "Did you mean mmlu?"),
        (["alignment-tax/mmlu@0"], "1 or more"),
        (["harness:"], "lm-eval's name of a task"),
        (["alignment-tax", "harness:gsm8k_cot"], "gsm8k_cot is asked for twice"),
    ],
)
def test_wrong_names_are_refused(names, said):
    """Goes red if a wrong name or number is taken, or a task would run twice."""
    with pytest.raises(RequestError, match=said.replace("?", r"\?")):
        choose_tasks(names)
