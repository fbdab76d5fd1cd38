"""reasoning-gym's scorers on the entries of a source."""

from __future__ import annotations

import pytest

from psft.data.gym import open_gym_task, parse_gym_source
from psft.errors import RequestError
from psft.rewards import get_grader

SOURCE = "reasoning-gym:chain_sum?size=4&seed=7&max_terms=3&max_digits=2"


@pytest.mark.parametrize("extract", ["auto", "tag", "boxed", "last_line", "last_number", "whole"])
def test_the_right_answer_is_found_where_it_should_be(extract):
    """Goes red if an extractor takes another part, or the entry scored is not the one shown."""
    writings = {
        "auto": "It is <answer>{}</answer>.", "tag": "<answer>0</answer> no: <answer> {} </answer>",
        "boxed": r"so \boxed{{{}}}", "last_line": "Let me see.\n{}\n", "last_number": "7 + 8 = {}.",
        "whole": " {} ",
    }  # fmt: skip
    grader, task = get_grader("reasoning_gym", extract=extract), open_gym_task(SOURCE)
    for index in range(4):
        gold = task[index]["answer"]
        for answer, score in ((gold, 1.0), (str(int(gold) + 1), 0.0)):
            row = {"response": writings[extract].format(answer), "gym_source": SOURCE, "gym_index": index}
            grade = grader(row)
            assert grade.extracted == answer and (grade.score == 1.0) == (score == 1.0)


def test_no_answer_is_counted_and_not_guessed():
    grade = get_grader("reasoning_gym")({"response": "hm 12", "gym_source": SOURCE, "gym_index": 0})
    assert (grade.score, grade.extracted, grade.is_failure) == (0.0, None, False)


def test_metadata_of_every_kind_is_scored_after_the_entry_was_made_again():
    """A countdown is right in any form that gives its number. Goes red if entries travel as text instead."""
    source = "reasoning-gym:countdown?size=3&seed=2"
    for index in range(3):
        row = {"response": open_gym_task(source)[index]["answer"], "gym_source": source, "gym_index": index}
        assert get_grader("reasoning_gym", extract="whole")(row).score == 1.0


def test_the_configuration_of_the_task_is_read():
    assert parse_gym_source("reasoning-gym:chain_sum?size=3&max_terms=2&x=a") == (
        "chain_sum",
        {"size": 3, "seed": 0, "max_terms": 2, "x": "a"},
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning-gym:chain_sums", "Did you mean chain_sum?"),
        ("reasoning-gym:chain_sum?size=0", "whole number"),
        ("reasoning-gym:chain_sum?size=2.5", "whole number"),
        ("reasoning-gym:chain_sum?colour=1", "refuses this configuration"),
        ("reasoning-gym:chain_sum?min_terms=9&max_terms=2", "refuses this configuration"),
    ],
)
def test_what_cannot_be_made_is_refused(source, message):
    with pytest.raises(RequestError, match=message):
        open_gym_task(source)
