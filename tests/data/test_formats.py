"""Laws of recognising and checking rows: every known format reaches the same conversation, every bad row a reason."""

from __future__ import annotations

from typing import Any

import pytest

from psft.data.formats import FORMATS, choose_format
from psft.data.rows import Conversation, Row, RowRejected
from psft.data.validate import to_conversation
from psft.errors import RequestError

Q, A = "1 + 1 = ?", "It is 2."
CHAT = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
ROWS = {
    "messages": {"messages": CHAT},
    "conversations": {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
    "prompt-completion": {"prompt": Q, "completion": A},
    "prompt-demonstration": {"prompt": CHAT[:1], "demonstration": A, "answer": "2"},
    "instruction": {"instruction": Q, "input": "", "output": A},
    "question-answer": {"question": Q, "answer": A},
    "text": {"text": A},
}


def convert(value: Any, *, columns: dict[str, str] | None = None, system_prompt: str | None = None) -> Conversation:
    format = choose_format([value], columns=columns, source="data.jsonl")
    return to_conversation(Row("data.jsonl", 1, value), format, columns=columns, system_prompt=system_prompt)


def reason_of(value: Any, format_name: str | None = None) -> str:
    format = choose_format([value], dataset_format=format_name or "auto", source="data.jsonl")
    with pytest.raises(RowRejected) as caught:
        to_conversation(Row("data.jsonl", 1, value), format)
    return str(caught.value)


def test_every_format_has_a_row_here():
    """Goes red if a format is added without a test row."""
    assert list(ROWS) == [format.name for format in FORMATS]


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_recognised_by_its_fields_and_gives_one_conversation(name):
    """Goes red if a format is mistaken for another, or its answer lands in the prompt."""
    assert choose_format([ROWS[name]], source="data.jsonl").name == name
    conversation = convert(ROWS[name])
    if name == "text":
        assert conversation == Conversation((), text=A)
    else:
        assert list(conversation.messages) == CHAT


def test_prompt_and_completion_may_be_messages_and_only_the_completion_is_trained():
    """Goes red if assistant turns of the prompt count as answers."""
    conversation = convert({"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]})
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "user", "assistant"]
    assert conversation.first_trained == 3


def test_alpaca_input_is_joined_to_the_instruction():
    """Goes red if `input` is dropped."""
    assert convert({"instruction": "Add.", "input": Q, "output": A}).messages[0]["content"] == f"Add.\n\n{Q}"


def test_columns_map_roles_to_fields_and_win_over_other_formats():
    """Goes red if a mapped role is ignored because another format's fields are there too."""
    row = {"messages": CHAT[:1], "q": Q, "chosen": A}
    assert list(convert(row, columns={"question": "q", "answer": "chosen"}).messages) == CHAT


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        ({"foo": 1, "bar": 2}, {}, r"fields \(foo, bar\) fit no known format.*messages.*question \+ answer"),
        ({"question": Q}, {"columns": {"answr": "x"}}, r"unknown role 'answr' \(did you mean 'answer'\?\)"),
        ({"question": Q, "reply": A}, {"columns": {"answer": "repl"}}, r"no field 'repl'.*did you mean 'reply'"),
        ({"text": A}, {"dataset_format": "mesages"}, r"unknown format 'mesages' \(did you mean 'messages'\?\)"),
    ],
)
def test_a_request_that_fits_no_field_says_what_there_is(value, options, expected):
    """Goes red if the message lacks the fields seen, the formats known or the nearest name."""
    with pytest.raises(RequestError, match=expected):
        choose_format([value], source="data.jsonl", **options)


def test_a_first_row_that_lacks_a_field_does_not_decide_the_format():
    """Goes red if only the first row is looked at."""
    assert choose_format([{"question": Q}, ["x"], ROWS["question-answer"]], source="d").name == "question-answer"


def test_the_system_prompt_goes_before_conversations_that_have_none():
    """Goes red if it is missing, doubled, or shifts which turns are trained."""
    added = convert(ROWS["prompt-completion"], system_prompt="Be brief.")
    assert added.messages[0] == {"role": "system", "content": "Be brief."} and added.first_trained == 2
    own = {"messages": [{"role": "system", "content": "Mine."}, *CHAT]}
    assert [m["content"] for m in convert(own, system_prompt="Be brief.").messages] == ["Mine.", Q, A]
    assert convert({**ROWS["conversations"], "system": "Field."}).messages[0]["content"] == "Field."


def test_content_given_as_text_parts_is_joined():
    """Goes red if multimodal-style text content is refused."""
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "2."}]
    assert convert({"messages": [CHAT[0], {"role": "assistant", "content": parts}]}).messages[1]["content"] == A


def messages(*turns: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (messages(("user", Q)), "ends with the user"),
        (messages(("user", Q), ("assistant", A), ("system", "x")), "ends with the system"),
        (messages(("assistant", A)), "starts with the assistant"),
        (messages(("user", Q), ("robot", A)), "unknown role ('robot' in message 2)"),
        (messages(("user", Q), ("tool", A)), "tool calls are not supported"),
        (messages(("user", Q), ("assistant", " \n")), "empty answer"),
        (messages(("user", ""), ("assistant", A)), "'content' is empty"),
        (messages(("user", Q), ("assistant", None)), "has no 'content'"),
        (messages(("user", Q), ("assistant", 7)), "'content' is not text (a int)"),
        (messages(("user", [{"type": "image", "url": "x"}]), ("assistant", A)), "part that is not text ('image')"),
        (messages(("user", Q), ("assistant", "\ud800")), "broken character"),
        (messages((["user"], Q)), "has no 'role'"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": None, "x": 1}, "field 'messages' is missing"),
        ({"messages": 3}, "not a list of messages (a int)"),
        ({"messages": "nonsense"}, "not a list of messages"),
        ({"messages": ["hi"]}, "a message is not an object"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "tool calls are not supported"),
        ({"messages": [{"role": "system", "content": ""}]}, "has no turn"),
        ({"conversations": [{"from": "alien", "value": Q}]}, "unknown role"),
        ({"prompt": "", "completion": A}, "'prompt' is empty"),
        ({"prompt": [], "completion": A}, "'prompt' is empty"),
        ({"prompt": Q, "completion": "  "}, "empty answer"),
        ({"prompt": Q, "demonstration": 5}, "'demonstration' is not text"),
        ({"instruction": Q, "input": 4, "output": A}, "'input' is not text"),
        ({"question": Q, "answer": ""}, "empty answer"),
        ({"text": " "}, "'text' is empty"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_rejected_with_its_reason(value, expected):
    """Goes red if the row passes, crashes, or the reason names something else."""
    assert expected in reason_of(value)


@pytest.mark.parametrize("value", [3, None, "x", [1], True])
def test_a_row_that_is_no_object_is_rejected(value):
    """Goes red if a JSON value other than an object crashes validation."""
    assert "not an object with fields" in reason_of(value, "messages")
