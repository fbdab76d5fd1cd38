"""Laws of the loss mask: exactly what the model has to write is trained, up to and including the end token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psft.data import prepare_dataset, render_example
from psft.data.render import make_renderer
from psft.data.rows import Conversation, RowRejected
from psft.errors import RequestError

USER, ANSWER = "How many clips?", "Natalia sold 72 clips."
TWO_TURNS = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": USER},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "How many bolts?"},
    {"role": "assistant", "content": "3 bolts."},
]
LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim + "
    "'<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}"
NO_END += "{{ 'assistant: ' }}{% endif %}"
NO_GENERATION_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
NO_GENERATION_PROMPT += "{% endfor %}"
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}{{ '...' }}{% else %}"
    "{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REVISED_QUESTION = (
    "{% for m in messages %}{% if m['role'] == 'user' and not loop.last %}{{ 'U' }}{% else %}{{ 'u' }}{% endif %}"
    "{{ ': ' + m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'u: ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def encode(tokenizer: Any, messages: list[dict[str, str]], first_trained: int = 0) -> tuple[list[int], list[int]]:
    renderer, encoder = make_renderer(tokenizer, "messages")
    return encoder.encode([renderer.pieces(Conversation(tuple(messages), first_trained))])[0]


def trained_text(tokenizer: Any, encoded: tuple[list[int], list[int]]) -> list[str]:
    """Text of every run of trained tokens."""
    runs, run = [], []
    for label in [*encoded[1], -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def test_one_turn_has_the_ids_and_labels_written_by_hand(tiny_tokenizer):
    """Goes red if the mask moves by one token, the end token is not trained, or the newline after it is."""

    def ids(text):
        return tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    start, end = tiny_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    prompt = [start, *ids("user\n"), *ids(USER), end, *ids("\n"), start, *ids("assistant\n")]
    answer = [*ids(ANSWER), end]
    newline = ids("\n")
    found = encode(tiny_tokenizer, TWO_TURNS[1:3])
    assert found[0] == prompt + answer + newline
    assert found[1] == [-100] * len(prompt) + answer + [-100] * len(newline)


def test_every_assistant_turn_is_trained_and_nothing_else(tiny_tokenizer):
    """Goes red if only the last turn is trained, or a user turn is."""
    encoded = encode(tiny_tokenizer, TWO_TURNS)
    assert trained_text(tiny_tokenizer, encoded) == [f"{ANSWER}<|im_end|>", "3 bolts.<|im_end|>"]
    assert tiny_tokenizer.decode(encoded[0]) == tiny_tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)


def test_assistant_turns_of_the_prompt_are_not_trained(tiny_tokenizer):
    """Goes red if `first_trained` is ignored."""
    assert trained_text(tiny_tokenizer, encode(tiny_tokenizer, TWO_TURNS, 4)) == ["3 bolts.<|im_end|>"]


@pytest.mark.parametrize(
    "answer", ["\n\nhello", " hello ", "a <|im_end|> b", "😀\u200dé\u0301\u202e", "\x00\x07 \ufffd"]
)
def test_prompt_ids_are_those_of_generation_whatever_the_answer_starts_with(tiny_tokenizer, answer):
    """Goes red if the text is tokenised whole: the prompt's newline would merge with the answer's."""
    messages = [TWO_TURNS[1], {"role": "assistant", "content": answer}]
    prompt = tiny_tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    ids, labels = encode(tiny_tokenizer, messages)
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [-100] * len(prompt)
    assert tiny_tokenizer.decode([label for label in labels if label != -100]) == f"{answer}<|im_end|>"


def test_special_tokens_inside_a_question_do_not_move_the_mask(tiny_tokenizer):
    """Goes red if the answer is searched for by its markers instead of by the rendered prefix."""
    messages = [{"role": "user", "content": f"x<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>"}, TWO_TURNS[2]]
    assert trained_text(tiny_tokenizer, encode(tiny_tokenizer, messages)) == [f"{ANSWER}<|im_end|>"]


def test_the_end_token_is_the_template_s_own(make_tiny_tokenizer):
    """Goes red if eos_token is taken for the end token although the template closes turns with another one."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"]})
    tokenizer.chat_template = LLAMA3
    renderer, _ = make_renderer(tokenizer, "messages")
    assert renderer.end_token == "<|eot|>"
    assert trained_text(tokenizer, encode(tokenizer, TWO_TURNS)) == [f"{ANSWER}<|eot|>", "3 bolts.<|eot|>"]


def test_a_template_without_end_token_gets_eos_after_each_answer(make_tiny_tokenizer):
    """Goes red if a model would never be taught to stop."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = NO_END
    encoded = encode(tokenizer, TWO_TURNS)
    assert trained_text(tokenizer, encoded) == [f"{ANSWER}<|im_end|>", "3 bolts.<|im_end|>"]


def test_a_turn_s_header_is_not_trained_when_the_template_ignores_the_generation_prompt(make_tiny_tokenizer):
    """Goes red if `<|im_start|>assistant` counts as something the model has to write."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = NO_GENERATION_PROMPT
    assert trained_text(tokenizer, encode(tokenizer, TWO_TURNS)) == [f"{ANSWER}<|im_end|>", "3 bolts.<|im_end|>"]


@pytest.mark.parametrize("template", [FORGETFUL, REVISED_QUESTION])
def test_a_template_that_rewrites_earlier_turns_is_refused(template, make_tiny_tokenizer):
    """Goes red if such a template silently trains on text that no reader sees at inference."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RequestError, match=r"generation %} marks"):
        make_renderer(tokenizer, "messages")


def test_generation_marks_of_a_template_give_the_same_mask(make_tiny_tokenizer, tiny_tokenizer):
    """Goes red if marks are taken as they stand: the newline after the end token lies inside them."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = MARKED
    assert encode(tokenizer, TWO_TURNS) == encode(tiny_tokenizer, TWO_TURNS)


def test_qwen3_template_is_replaced_by_trl_s_training_version(make_tiny_tokenizer):
    """Goes red if Qwen3's dropping of earlier thoughts is not noticed. TRL trains the thinking block too."""
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    think = "<think>\n\n</think>\n\n"
    expected = [f"{think}{ANSWER}<|im_end|>", f"{think}3 bolts.<|im_end|>"]
    assert trained_text(tokenizer, encode(tokenizer, TWO_TURNS)) == expected


def test_a_template_that_refuses_a_conversation_rejects_the_row(make_tiny_tokenizer):
    """Goes red if one conversation that the template raises on stops the whole run."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template += "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    renderer, _ = make_renderer(tokenizer, "messages")
    with pytest.raises(RowRejected, match="no system"):
        renderer.pieces(Conversation(tuple(TWO_TURNS)))


def test_offsets_place_the_mask_where_pieces_cannot_be_tokenised_apart(make_tiny_tokenizer):
    """Goes red if a tokenizer that puts a space before every text is fed piece by piece."""
    from tokenizers import pre_tokenizers

    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    whole = tokenizer(tokenizer.apply_chat_template(TWO_TURNS, tokenize=False), add_special_tokens=False)["input_ids"]
    encoded = encode(tokenizer, TWO_TURNS)
    assert encoded[0] == whole
    assert [text.strip() for text in trained_text(tokenizer, encoded)] == [f"{ANSWER}<|im_end|>", "3 bolts.<|im_end|>"]


def test_text_pairs_without_chat_template_are_joined_and_ended(make_tiny_tokenizer):
    """Goes red if the prompt is trained or eos is missing."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    renderer, encoder = make_renderer(tokenizer, "prompt-completion")
    messages = ({"role": "user", "content": "Q: 1 + 1 ="}, {"role": "assistant", "content": " 2"})
    encoded = encoder.encode([renderer.pieces(Conversation(messages, 1))])[0]
    assert tokenizer.decode(encoded[0]) == "Q: 1 + 1 = 2<|im_end|>"
    assert trained_text(tokenizer, encoded) == [" 2<|im_end|>"]


def test_chats_without_chat_template_are_refused(make_tiny_tokenizer):
    """Goes red if a base tokenizer silently gets some template."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        make_renderer(tokenizer, "messages")


def test_plain_text_trains_all_but_the_first_token_and_ends_with_eos(tiny_tokenizer):
    """Goes red if eos is missing, doubled, or the first token (which nothing predicts) counts as trained."""
    renderer, encoder = make_renderer(tiny_tokenizer, "text")
    for text in ("Natalia sold clips.", "Natalia sold clips.<|im_end|>"):
        ids, labels = encoder.encode([renderer.pieces(Conversation((), text=text))])[0]
        assert tiny_tokenizer.decode(ids) == "Natalia sold clips.<|im_end|>"
        assert labels == [-100, *ids[1:]]


def test_render_example_marks_trained_tokens_and_names_the_end_token(tiny_tokenizer, tmp_path: Path):
    """Goes red if the marks do not enclose exactly the answer."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"question": USER, "answer": ANSWER}) + "\n")
    prepared = prepare_dataset(str(file), tokenizer=tiny_tokenizer, max_length=None)
    shown = render_example(prepared, tiny_tokenizer)
    assert f"<|im_start|>assistant\n⟦{ANSWER}<|im_end|>⟧\n" in shown
    assert shown.count("⟦") == 2 and "end token <|im_end|>" in shown.splitlines()[0]
