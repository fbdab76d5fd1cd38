"""Prompts for reinforcement learning: recognised, checked, each once, none too long."""

from __future__ import annotations

import gzip
import json

import pytest

from psft.data.prompts import fields_of, prepare_prompts
from psft.errors import RequestError


@pytest.fixture
def prepare(tmp_path, tiny_tokenizer):
    """prepare(rows or source, **settings) -> PreparedPrompts."""

    def call(rows, **settings):
        source = rows
        if not isinstance(rows, str):
            source = str(tmp_path / "rows.jsonl")
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare_prompts(source, tokenizer=tiny_tokenizer, **{"max_prompt_length": 64, **settings})

    return call


USER = [{"role": "user", "content": "1 + 1?"}]
DAPO = {"prompt": USER, "reward_model": {"ground_truth": "2", "style": "rule"}, "extra_info": {"index": "a"}}


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"prompt": "1 + 1?", "gold": "2"}, "2"), ({"prompt": USER, "answer": "2"}, "2"), (DAPO, "2"),
        ({"question": "1 + 1?", "answer": "One and one.\n#### 2"}, "2"), ({"problem": "1 + 1?", "answer": 2}, 2),
        ({"messages": [*USER, {"role": "assistant", "content": "2"}]}, None),
        ({"prompt": "1 + 1?", "gold": "A", "answer": "the text"}, "A"),
    ],
)  # fmt: skip
def test_every_kind_of_row_becomes_messages_and_gold(prepare, row, gold):
    """Goes red if a field is not found, or a worked solution is taken for the answer."""
    (made,) = prepare([row]).rows
    assert made["prompt"] == USER and fields_of(made).get("gold") == gold


def test_columns_and_system_prompt(prepare):
    made = prepare(
        [{"q": "1 + 1?", "a": "2", "level": 3}], columns={"prompt": "q", "gold": "a"}, system_prompt="Count."
    )
    assert made.rows[0]["prompt"] == [{"role": "system", "content": "Count."}, *USER]
    assert fields_of(made.rows[0]) == {"gold": "2", "level": 3}
    with pytest.raises(RequestError, match="column x of columns is missing"):
        prepare([{"q": "1"}], columns={"prompt": "x"})


def test_copies_are_left_out_and_counted(prepare):
    """Goes red if one is kept, or a copy with another answer passes unseen."""
    rows = [DAPO, {**DAPO, "extra_info": {"index": "b"}}, {**DAPO, "reward_model": {"ground_truth": "3"}}]
    report = prepare(rows).report
    assert (report.num_rows, report.num_used, report.num_duplicates, report.num_conflicting) == (3, 1, 2, 1)
    assert "2 copies left out, 1 of them with another answer" in report.line
    assert prepare(rows, keeps_duplicates=True).report.num_used == 3


def test_long_prompts_are_left_out_and_counted(prepare, tiny_tokenizer):
    """The limit is on tokens, template included, and itself allowed. Goes red if it is off by one or stops the run."""
    rows = [{"prompt": "a"}, {"prompt": "b" * 300}]
    length = prepare(rows[:1]).report.longest
    rendered = tiny_tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)
    assert length == len(rendered["input_ids"] if hasattr(rendered, "keys") else rendered)
    made = prepare(rows, max_prompt_length=length)
    assert (made.report.num_used, made.report.num_too_long, made.report.num_rejected) == (1, 1, 0)
    assert made.rejections[0].line == 2 and "longer than max_prompt_length" in made.rejections[0].message
    with pytest.raises(RequestError, match="every prompt is longer"):
        prepare(rows, max_prompt_length=length - 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "1 + 1?"}, "no prompt"), ({"prompt": " "}, "'prompt' is empty"), ({"prompt": 3}, "neither a text"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "no role"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "does not end with a user's turn"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_its_line(prepare, row, message):
    with pytest.raises(RequestError, match=f"rows.jsonl:2: .*{message}"):
        prepare([{"prompt": "a"}, row])
    made = prepare([{"prompt": "a"}, row], on_bad_row="skip")
    assert (made.report.num_used, made.report.num_rejected) == (1, 1)


def test_what_a_reward_lacks_is_a_bad_row(prepare):
    def check(fields, messages):
        if "gold" not in fields:
            raise RequestError("reward math: field 'gold' is missing.")

    with pytest.raises(RequestError, match="rows.jsonl:1: reward math: field 'gold' is missing"):
        prepare([{"prompt": "a"}], check=check)


def test_a_task_of_reasoning_gym_is_a_source(prepare):
    from psft.rewards import get_grader

    source = "reasoning-gym:chain_sum?size=5&seed=3"
    made = prepare(source, max_prompt_length=None)
    assert made.report.num_used == 5
    row = fields_of(made.rows[4])
    from psft.data.gym import open_gym_task

    answer = open_gym_task(source)[4]["answer"]
    assert get_grader("reasoning_gym", extract="whole")({**row, "response": answer}).score == 1.0


def test_a_data_set_keeps_fields_of_every_kind(prepare):
    """Goes red if the columns of rows that differ in kind are made alike."""
    rows = [{"prompt": "a", "kwargs": [{"n": 1}, {}]}, {"prompt": "b", "kwargs": "none", "more": 1.5}]
    dataset = prepare(rows).dataset
    assert [fields_of(row) for row in dataset] == [{"kwargs": [{"n": 1}, {}]}, {"kwargs": "none", "more": 1.5}]


def test_real_prompts_of_the_reinforcement_stage(shared_data, tiny_tokenizer):
    path = shared_data / "train" / "math8k_prompts.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        num_rows = sum(1 for _ in lines)
    made = prepare_prompts(str(path), tokenizer=tiny_tokenizer, max_prompt_length=2048, max_rows=400)
    assert made.report.num_used + made.report.num_duplicates + made.report.num_too_long == 400 <= num_rows
    assert all(fields_of(row)["gold"] for row in made.rows)
