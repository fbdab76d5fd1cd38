"""Greedy answers: left padding, end token and grading, on a model whose answers are known."""

import torch

from psft.data import last_number
from psft.evaluation.greedy import greedy_answers


def test_last_number_reads_any_form_of_the_answer():
    assert last_number("4 * 3 = 12\n#### 12") == "12"
    assert last_number("So she pays $1,200.00.") == "1200"
    assert last_number("no idea") is None


def test_a_batch_of_unequal_prompts_is_answered_as_each_alone_and_graded_against_its_own_gold(
    tiny_model, tiny_tokenizer
):
    """Goes red if prompts are padded on the right, or if sorting by length mixes up questions and gold answers."""
    questions = ["How many clips in May?", "How many bolts of white fiber does a robe take? " * 3, "Total?"]
    answers = []
    for question in questions:
        ids = tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = tiny_model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        answers.append(
            last_number(tiny_tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        )
    gold = [answer or "7" for answer in answers]
    conversations = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": f"#### {g}"}]
        for q, g in zip(questions, gold, strict=True)
    ]
    expected = sum(answer is not None for answer in answers)
    result = greedy_answers(tiny_model, tiny_tokenizer, conversations, max_new_tokens=12)
    assert (result.num_problems, result.num_correct, result.num_in_form) == (3, expected, 0)
    wrong = [[c[0], {"role": "assistant", "content": "#### 123456"}] for c in conversations]
    assert greedy_answers(tiny_model, tiny_tokenizer, wrong, max_new_tokens=12).num_correct == 0
