"""Multiple choice: what counts as an answer, what never does, and how options are shuffled."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from psft.errors import RequestError
from psft.rewards import get_grader
from psft.rewards.choice import extract_letter, shuffle_options

OPTIONS = ["Paris", "the city of Rome", "Berlin", "Madrid"]


@pytest.mark.parametrize(
    ("response", "letter", "how"),
    [
        (r"so it is \boxed{C}.", "C", "the box"),
        (r"first \boxed{A}, no: \boxed{\text{B}}", "B", "the box"),
        (r"\boxed{(d)}", "D", "the box"),
        (r"\boxed{\textbf{(B)}\ \text{the city of Rome}}", "B", "the box"),
        (r"\boxed{B: the city of Rome}", "B", "the box"),
        ("Therefore the answer is (B).\n\nQuestion: which", "B", "'answer is'"),
        ("The answer is **D**.", "D", "'answer is'"),
        (r"The correct answer is: $\boxed{\text{A}}$ cut \boxed{", "A", "the box"),
        ("the answer is (c)", "C", "'answer is'"),
        ("The answer is A because of this", "A", "'answer is'"),
        ("Some words.\nAnswer: C", "C", "'answer:'"),
        ("ANSWER: C\n", "C", "'answer:'"),
        ("**Answer:** B", "B", "'answer:'"),
        ("I would go with\nB", "B", "a letter alone"),
        ("B) the city of Rome", "B", "a letter alone"),
        ("So I choose D.", "D", "a letter alone"),
        ("The closest one is (C).\n\n", "C", "a letter alone"),
        (r"\boxed{\text{The city of Rome}}", "B", "the option's text"),
        (r"\boxed{the City of Rome}", "B", "the option's text"),
        ("The answer is Berlin.", "C", "the option's text"),
        ("It can only be\nMadrid.", "D", "the option's text"),
        ("The answer is a city.", None, ""),
        ("The answer is A city.", None, ""),
        ("The answer is E.", None, ""),  # no such option
        (r"\boxed{E}", None, ""),
        ("We get $x = T + C", None, ""),
        ("A man walks, B follows", None, ""),
        ("", None, ""),
    ],
)
def test_a_letter_is_found_where_an_answer_is_given_and_nowhere_else(response, letter, how):
    """Goes red if an extractor is left out or reordered, or letters of formulas, articles or other options count."""
    assert extract_letter(response, letters="ABCD", options=OPTIONS) == (letter, how)


def test_the_pronoun_is_no_option_but_the_letter_is():
    """Goes red if I is taken wherever it stands, or nowhere."""
    assert extract_letter("The answer is I think the second one") == (None, "")
    assert extract_letter("The answer is (I).") == ("I", "'answer is'")
    assert extract_letter("The answer is I.") == ("I", "'answer is'")


def test_no_answer_scores_nothing_and_is_told_apart_from_a_wrong_one():
    """Goes red if a missing answer is replaced by a letter, as MMLU-Pro's own script does."""
    grader = get_grader("choice")
    none = grader({"response": "I cannot say.", "gold": "B"})
    wrong = grader({"response": "Answer: C", "gold": "b"})
    right = grader({"response": "Answer: B", "gold": "(B)"})
    assert (none.score, none.extracted, none.reason) == (0.0, None, "no answer found")
    assert (wrong.score, wrong.extracted) == (0.0, "C") and "gold is B" in wrong.reason
    assert (right.score, right.extracted) == (1.0, "B")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"gold": "A"}, "'response' is missing"),
        ({"response": "x"}, "'gold' is missing"),
        ({"response": "x", "gold": "E", "options": OPTIONS}, "the options are A to D"),
        ({"response": "x", "gold": "A", "options": "Paris"}, "not a list"),
        ({"response": "x", "gold": "A", "options": ["one"]}, "2 to 26"),
    ],
)
def test_a_row_that_cannot_be_graded_is_refused(row, words):
    """Goes red if a row without gold scores 0 instead of being refused."""
    with pytest.raises(RequestError, match=words):
        get_grader("choice").check(row)


def test_options_are_shuffled_by_seed_and_item_and_the_letter_follows():
    """Goes red if the letter keeps its place, or if items share an order."""
    options = ["right", "w1", "w2", "w3"]
    letters = Counter()
    orders = set()
    for item in range(400):
        shuffled, letter = shuffle_options(options, 0, seed=7, item_id=f"item-{item}")
        assert sorted(shuffled) == sorted(options) and shuffled["ABCD".index(letter)] == "right"
        assert (shuffled, letter) == shuffle_options(options, 0, seed=7, item_id=f"item-{item}")
        letters[letter] += 1
        orders.add(tuple(shuffled))
    assert len(orders) == 24 and all(70 < letters[letter] < 130 for letter in "ABCD")
    assert shuffle_options(options, 0, seed=7, item_id="item-0")[0] == ["w1", "right", "w2", "w3"]  # on every machine
    with pytest.raises(RequestError, match="number 4 of 4"):
        shuffle_options(options, 4, seed=0, item_id="x")


@pytest.mark.slow
def test_stored_mmlu_pro_outputs_score_as_published_extractions_do(shared_data):
    """Goes red if extraction moves the score: 43.36 % by the first pattern of lm-eval, 8.5 % without answer."""
    folder = shared_data / "mmlu_pro"
    options = {}
    with gzip.open(folder / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            options[row["question_id"]] = row["options"]
    grader = get_grader("choice")
    with gzip.open(folder / "llama31_8b_instruct_5shot_outputs.jsonl.gz", "rt", encoding="utf-8") as file:
        grades = [
            grader({"response": r["generated_text"], "gold": r["answer"], "options": options[r["question_id"]]})
            for r in map(json.loads, file)
        ]
    score = 100 * sum(grade.score for grade in grades) / len(grades)
    none = 100 * sum(grade.extracted is None for grade in grades) / len(grades)
    print(
        f"MMLU-Pro, stored outputs of Llama-3.1-8B-Instruct: {score:.2f} %, no answer {none:.2f} %, n = {len(grades)}"
    )
    assert len(grades) == 12032 and abs(score - 43.4) < 0.3 and 7 < none < 10
