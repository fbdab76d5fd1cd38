"""Overlong punishment, length, form: every boundary."""

from __future__ import annotations

from fractions import Fraction

import pytest

from psft.errors import RequestError
from psft.rewards import get_grader
from psft.rewards.shaping import soft_overlong_punishment


def by_the_paper(num_tokens: int, longest: int, buffer: int) -> Fraction:
    """Equation 13 of DAPO (arXiv:2503.14476), case by case, exactly."""
    if num_tokens <= longest - buffer:
        return Fraction(0)
    if num_tokens <= longest:
        return Fraction(longest - buffer - num_tokens, buffer)
    return Fraction(-1)


@pytest.mark.parametrize(("longest", "buffer"), [(10, 4), (10, 1), (10, 10), (1, 1), (257, 64)])
def test_every_length_is_punished_as_the_paper_says(longest, buffer):
    """Goes red if a boundary moves by one token, the slope changes, or -1 is passed."""
    for num_tokens in range(longest + buffer + 3):
        found = soft_overlong_punishment(num_tokens, max_completion_length=longest, buffer=buffer)
        assert found == float(by_the_paper(num_tokens, longest, buffer)), num_tokens
    assert str(soft_overlong_punishment(0, max_completion_length=longest, buffer=buffer)) == "0.0"


@pytest.mark.parametrize("num_tokens", [0, 8191, 8192, 8193, 9216, 10239, 10240, 10241, 20000])
def test_table_7_at_its_boundaries(num_tokens):
    """A buffer of 2k under 10k; TRL's function agrees. Goes red if the buffer is counted from elsewhere."""
    from trl.rewards import get_soft_overlong_punishment

    row = {"num_tokens": num_tokens}
    score = get_grader("overlong", max_completion_length=10240, buffer=2048)(row).score
    (theirs,) = get_soft_overlong_punishment(10240, 2048)(completion_ids=[[0] * num_tokens])
    assert score == theirs == float(by_the_paper(num_tokens, 10240, 2048))


@pytest.mark.parametrize(
    ("form", "response", "score"),
    [
        ("boxed", r"so \boxed{4}", 1), ("boxed", r"so \boxed{}", 0), ("boxed", r"so \boxed{4", 0), ("boxed", "so 4", 0),
        ("answer_tag", "2 + 2 <answer>4</answer>", 1), ("answer_tag", "<answer>4</answer>\n", 1),
        ("answer_tag", "<answer>4</answer> or so", 0), ("answer_tag", "<answer>4</answer><answer>5</answer>", 0),
        ("answer_tag", "<answer> </answer>", 0), ("answer_tag", "4", 0),
        ("think_answer", "<think>hm</think>\n<answer>4</answer>", 1), ("think_answer", "<answer>4</answer>", 0),
        ("think_answer", "<think>a</think><answer>4</answer><answer>5</answer>", 0),
    ],
)  # fmt: skip
def test_a_form_is_there_or_not(form, response, score):
    """Goes red if an empty, doubled or cut-off form counts."""
    assert get_grader("format", form=form)({"response": response}).score == score


def test_a_pattern_of_ones_own_must_match_everything():
    """Goes red if a part is enough, or if it is searched for in this process, which it could hang."""
    grader = get_grader("format", pattern=r"\d+")
    assert not grader.is_quick and get_grader("format").is_quick
    assert [grader({"response": text}).score for text in ("42", "42 or so", "")] == [1.0, 0.0, 0.0]


def test_shorter_is_better_between_the_ends():
    """Goes red if an end is not reached, or the slope leaves 0 to 1."""
    grader = get_grader("length", max_completion_length=100, shortest=20)
    assert [grader({"num_tokens": n}).score for n in (0, 20, 60, 100, 101)] == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("overlong", {"max_completion_length": 10, "buffer": 0}, "between 1 and"),
        ("overlong", {"max_completion_length": 10, "buffer": 11}, "between 1 and"),
        ("length", {"max_completion_length": 10, "shortest": 10}, "below longest"),
        ("format", {"form": "box"}, "one of boxed"),
        ("format", {"pattern": "("}, "no regular expression"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(name, settings, message):
    with pytest.raises(RequestError, match=message):
        get_grader(name, **settings)
