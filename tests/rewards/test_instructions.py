"""Instruction following: lm-eval's checkers behind the grader's interface, offline."""

from __future__ import annotations

import json
import random

import pytest

from psft.errors import RequestError
from psft.rewards import get_grader, grade_rows

pytest.importorskip("lm_eval", reason="the checkers are in the extra `eval`")

ROW = {
    "prompt": "Write without commas, in two words or more.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"relation": "at least", "num_words": 2}],
}


@pytest.fixture
def grader(shared_data):
    return get_grader("ifeval", nltk_data=str(shared_data / "ifeval" / "nltk_data"))


def test_a_prompt_counts_if_all_its_instructions_are_followed(grader):
    """Goes red if one instruction is enough, strict and loose are swapped, or the empty response follows any."""
    grader.prepare()
    state = random.getstate()
    good = grader({**ROW, "response": "two words"})
    assert (good.score, good.extracted, good.reason) == (1.0, "2 of 2 instructions", "all instructions followed")
    half = grader({**ROW, "response": "a, b, c"})
    assert (half.score, half.details["instructions_strict"]) == (0.0, [False, True])
    assert half.reason == "not followed: punctuation:no_comma"
    only_loose = grader({**ROW, "response": "Sure, here it is:\ntwo words"})
    assert (only_loose.score, only_loose.details["strict"], only_loose.details["loose"]) == (1.0, 0.0, 1.0)
    empty = grader({**ROW, "response": " "})
    assert (empty.score, empty.extracted) == (0.0, None)
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "'prompt'"),
        ({"instruction_id_list": []}, "instruction_id_list"),
        ({"kwargs": [{}]}, "list of 2 mappings"),
        ({"kwargs": [{}, 3]}, "something else than mappings"),
    ],
)
def test_a_row_that_cannot_be_graded_is_refused(change, words):
    with pytest.raises(RequestError, match=words):
        get_grader("ifeval").check({**ROW, "response": "x", **change})


def test_an_unknown_instruction_is_named(grader):
    with pytest.raises(RequestError, match="no instruction called made:up"):
        grader({**ROW, "response": "x", "instruction_id_list": ["punctuation:no_comma", "made:up"]})


def test_nothing_is_downloaded_where_the_sentence_model_is_missing(monkeypatch):
    """Goes red if nltk's download is reached: lm-eval would start one as it is imported."""
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *a, **k: pytest.fail("a download was started"))
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk.data, "find", lambda name: (_ for _ in ()).throw(LookupError(name)))
    with pytest.raises(RequestError, match="punkt_tab.*NLTK_DATA"):
        get_grader("ifeval").prepare()


@pytest.mark.slow
def test_published_labels_are_met(shared_data):
    """Two models' answers to IFEval with labels for each instruction; at least 99 % in both readings."""
    folder = shared_data / "ifeval"
    by_prompt = {row["prompt"]: row for row in map(json.loads, (folder / "input_data.jsonl").open(encoding="utf-8"))}
    for model in ("gpt-4o-mini", "mistral-7b-instruct-v0.3"):
        labelled = [json.loads(line) for line in (folder / f"labelled_{model}.jsonl").open(encoding="utf-8")]
        labelled = [row for row in labelled if row["prompt"] in by_prompt]  # a few were spelt anew since
        rows = [{**by_prompt[row["prompt"]], "response": row["response"]} for row in labelled]
        grades = list(grade_rows("ifeval", rows, nltk_data=str(folder / "nltk_data")))
        for level in ("strict", "loose"):
            pairs = [
                (one, other)
                for grade, row in zip(grades, labelled, strict=True)
                for one, other in zip(grade.details[f"instructions_{level}"], row[level], strict=True)
            ]
            same = sum(one == bool(other) for one, other in pairs)
            print(f"IFEval, {model}, {level}: {same} of {len(pairs)} instructions")
            assert same >= 0.99 * len(pairs) and len(pairs) > 500
