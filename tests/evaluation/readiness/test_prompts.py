"""The prompts that readiness is measured on: made here, of a benchmark, or of a person's own file."""

from __future__ import annotations

import json

import pytest

from psft.data.gym import open_gym_task
from psft.errors import RequestError
from psft.evaluation.items import load_data
from psft.evaluation.readiness.prompts import MOST_PROMPTS, as_rollouts, readiness_suite
from psft.evaluation.settings import HowToSample, WhatToEvaluate
from psft.rewards import get_grader


def test_bundled_prompts_are_there_offline_always_the_same_and_gradable():
    """Goes red if one is made with other numbers each time, its gold answer is not right, or a wrong one is."""
    suite = readiness_suite(["rl-readiness"])
    assert suite.name == "rl-readiness"
    first = [load_data(benchmark, None) for benchmark in suite.benchmarks]
    assert [len(data.items) for data in first] == [32, 32]
    assert [data.sha256 for data in first] == [load_data(benchmark, None).sha256 for benchmark in suite.benchmarks]
    for data in first:
        assert data.benchmark.name.startswith("rl-readiness/") and len({item.question for item in data.items}) > 24
        grader = get_grader("math", **data.benchmark.grader)
        for item in data.items:
            gold = item.grading["gold"]
            assert grader({**item.grading, "response": f"Let me see.\n#### {gold}"}).score == 1
            assert grader({**item.grading, "response": f"It is {gold}1."}).score == 0


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "What is 2 + 3?", "answer": "5"},
        {"question": "What is 2 + 3?", "gold": 5, "answer": "a worked solution"},
        {"question": "What is 2 + 3?", "answer": "2 + 3 = 5.\n#### 5"},
        {
            "messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "7"}],
            "gold": "5",
        },
        {"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "reward_model": {"ground_truth": "5"}},
    ],
)
def test_a_file_of_ones_own_is_understood(tmp_path, row):
    """Goes red if a usual name of question or answer is not known, or a prompt of messages is not taken as it is."""
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row) + "\n")
    suite = readiness_suite(["rl-readiness", str(path)])
    data = load_data(suite.benchmarks[0], None)
    assert suite.name == "rl-readiness-mine" and data.benchmark.limit == MOST_PROMPTS
    (item,) = data.items
    assert item.messages == ({"role": "user", "content": "What is 2 + 3?"},) and item.question == "What is 2 + 3?"
    assert str(item.grading["gold"]) == "5"


def test_copies_of_a_prompt_count_once(tmp_path):
    """DAPO-Math has each prompt a hundred times. Goes red if copies fill the limit, or the last copy counts."""
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"What is {i // 100}?", "answer": i} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(readiness_suite([str(path)]).benchmarks[0], None)
    assert [(item.question, item.grading["gold"]) for item in data.items] == [
        ("What is 0?", 0), ("What is 1?", 100), ("What is 2?", 200),
    ]  # fmt: skip


def test_benchmarks_get_the_sampling_of_rollouts_under_a_name_of_their_own():
    """Goes red if answers at temperature 1 could be read as AIME24's score, or flags do not win."""
    suite = readiness_suite(["rl-readiness", "aime24"])
    assert [benchmark.name for benchmark in suite.benchmarks] == ["rl-readiness/aime24"]
    what, how = as_rollouts(WhatToEvaluate(), HowToSample(), 8)
    assert (what.k, how.temperature, how.top_p) == (8, 1.0, 1.0)
    what, how = as_rollouts(WhatToEvaluate(k=32), HowToSample(temperature=0.6), 8)
    assert (what.k, how.temperature, how.top_p) == (32, 0.6, 1.0)


def test_what_is_no_prompt_is_refused_by_name(tmp_path):
    """Goes red if a file without answers is found out after generating."""
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"text": "hello"}) + "\n")
    with pytest.raises(RequestError, match="its rows have text, but not a question .* and an answer"):
        readiness_suite(["rl-readiness", str(path)])
    with pytest.raises(RequestError, match="cannot be read"):
        readiness_suite(["rl-readiness", str(tmp_path / "none.jsonl")])
    with pytest.raises(RequestError, match="no suite, benchmark or file named mth"):
        readiness_suite(["rl-readiness", "mth"])
    with pytest.raises(RequestError, match="reasoning-gym has no task"):
        readiness_suite(["rl-readiness", "reasoning-gym:chain_sums"])


@pytest.mark.parametrize(("task", "kind"), [("chain_sum", "math"), ("letter_counting", "math"),
                                            ("word_sorting", "reasoning_gym")])  # fmt: skip
def test_a_task_is_graded_by_what_its_answers_are(task, kind):
    """Goes red if words are graded as mathematics, so that no answer is ever right."""
    (benchmark,) = readiness_suite([f"reasoning-gym:{task}?size=3"]).benchmarks
    data = load_data(benchmark, None)
    assert benchmark.kind == kind and len(data.items) == 3
    grader = get_grader(kind, **benchmark.grader)
    for item, row in zip(data.items, open_gym_task(benchmark.file), strict=True):
        assert grader({**item.grading, "response": f"The answer is {row['answer']}"}).score == 1
        assert grader({**item.grading, "response": "I do not know."}).score < 1
