"""A row becomes a `Conversation`, or `RowRejected` says why it cannot be trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from psft.data.formats import Format, pick_roles
from psft.data.rows import Conversation, Row, RowRejected

Message = dict[str, str]
MAX_MESSAGES = 2000  # a template renders the conversation up to each answer: the work grows with the square of this
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
}
_ROLES = ("system", "user", "assistant")


def to_conversation(
    row: Row, format: Format, *, columns: Mapping[str, str] | None = None, system_prompt: str | None = None
) -> Conversation:
    """Check one row and bring it into the common form.

    Raises:
        RowRejected: not JSON, missing, empty or wrong-typed fields, unknown roles, an empty answer, a conversation
            that ends with anyone but the assistant, too many messages, or characters that no encoding has.
    """
    fields = fields_of(row, format, columns)
    if format.name == "text":
        return Conversation((), text=plain_text(fields["text"], "text"))
    messages, first_trained = _MAKERS[format.name](fields)
    num_turns = len(messages)
    messages = with_system(messages, fields, system_prompt)
    check_turns(messages)
    return Conversation(tuple(messages), first_trained + len(messages) - num_turns)


def fields_of(row: Row, format: Format, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The fields of a row under their role names.

    Raises:
        RowRejected: it could not be read, is no object, or lacks a field that the format requires.
    """
    if row.problem is not None:
        raise RowRejected(row.problem, row.detail)
    if not isinstance(row.value, Mapping):
        raise RowRejected("not an object with fields", f"a JSON {type(row.value).__name__}")
    fields = pick_roles(row.value, format, columns)
    for role in format.required:
        if fields.get(role) is None:
            raise RowRejected(f"field '{(columns or {}).get(role, role)}' is missing")
    return fields


def with_system(messages: list[Message], fields: Mapping[str, Any], system_prompt: str | None) -> list[Message]:
    """The conversation, opened by the row's own system prompt, else by `system_prompt`, where it has none yet."""
    if fields.get("system") and messages[0]["role"] != "system":
        messages = [a_message("system", plain_text(fields["system"], "system")), *messages]
    if system_prompt and messages[0]["role"] != "system":
        messages = [a_message("system", system_prompt), *messages]
    return messages


def a_message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def plain_text(value: Any, field: str) -> str:
    """A non-empty string that can be encoded, from a string or a list of text parts."""
    if isinstance(value, list):
        parts = []
        for part in value:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                kind = kind[:40] if isinstance(kind, str) else type(kind).__name__
                raise RowRejected(f"'{field}' holds a part that is not text", f"{kind!r}")
            parts.append(part["text"])
        value = "".join(parts)
    if not isinstance(value, str):
        raise RowRejected(f"'{field}' is not text", f"a {type(value).__name__}")
    if not value.strip():
        raise RowRejected(f"'{field}' is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRejected(f"'{field}' holds a broken character", "a lone surrogate, which UTF-8 has not") from error
    return value


def message_list(value: Any, field: str, *, role_key: str = "role", content_key: str = "content") -> list[Message]:
    if isinstance(value, str):  # a CSV cell, or a parquet column of JSON text
        try:
            value = json.loads(value, object_pairs_hook=_without_doubled_keys)
        except (ValueError, RecursionError):
            raise RowRejected(f"'{field}' is not a list of messages", "a text that is no JSON") from None
    if not isinstance(value, list):
        raise RowRejected(f"'{field}' is not a list of messages", f"a {type(value).__name__}")
    if not value:
        raise RowRejected(f"'{field}' is empty")
    if len(value) > MAX_MESSAGES:
        raise RowRejected("too many messages", f"{len(value)}; at most {MAX_MESSAGES} are taken")
    return [_one_message(item, number, role_key, content_key) for number, item in enumerate(value, start=1)]


def _without_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise RowRejected("a key is given twice", "in JSON text")
    return made


def _one_message(item: Any, number: int, role_key: str, content_key: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowRejected("a message is not an object", f"message {number} is a {type(item).__name__}")
    if role_key not in item and {"role", "from"} & item.keys():  # `conversations` with role/content, and the reverse
        role_key, content_key = ("role", "content") if "role" in item else ("from", "value")
    if item.get("tool_calls") or item.get("role") == "tool":
        raise RowRejected("tool calls are not supported", f"message {number}")
    role = item.get(role_key)
    if not isinstance(role, str):
        raise RowRejected(f"a message has no '{role_key}'", f"message {number}")
    known = _SHAREGPT_ROLES.get(role) if role_key == "from" else (role if role in _ROLES else None)
    if known is None:
        raise RowRejected("unknown role", f"{role[:40]!r} in message {number}")
    content = item.get(content_key)
    if content is None:
        raise RowRejected(f"a message has no '{content_key}'", f"message {number}, role {known}")
    if known == "assistant" and isinstance(content, str) and not content.strip():
        raise RowRejected("empty answer", f"message {number}")
    if known == "system" and content == "":
        return a_message(known, "")  # common in ShareGPT data; dropped below
    return a_message(known, plain_text(content, content_key))


def without_empty_system(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] != "system" or message["content"]]


def _from_messages(fields: dict[str, Any]) -> tuple[list[Message], int]:
    return _non_empty(without_empty_system(message_list(fields["messages"], "messages"))), 0


def _from_conversations(fields: dict[str, Any]) -> tuple[list[Message], int]:
    turns = message_list(fields["conversations"], "conversations", role_key="from", content_key="value")
    return _non_empty(without_empty_system(turns)), 0


def _non_empty(messages: list[Message]) -> list[Message]:
    if not messages:
        raise RowRejected("the conversation has no turn")
    return messages


def answer_text(value: Any, field: str) -> str:
    if isinstance(value, str) and not value.strip():
        raise RowRejected("empty answer", f"field '{field}'")
    return plain_text(value, field)


def is_message_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "type" not in value[0]


def _from_prompt(fields: dict[str, Any], answer_field: str) -> tuple[list[Message], int]:
    """Prompt and answer, each a text or a list of messages; only the answer's assistant turns are trained."""
    prompt, answer = fields["prompt"], fields[answer_field]
    if prompt == [] or answer == []:
        raise RowRejected(f"'{'prompt' if prompt == [] else answer_field}' is empty")
    if is_message_list(prompt):
        head = without_empty_system(message_list(prompt, "prompt"))
    else:
        head = [a_message("user", plain_text(prompt, "prompt"))]
    if is_message_list(answer):
        tail = message_list(answer, answer_field)
    else:
        tail = [a_message("assistant", answer_text(answer, answer_field))]
    return [*head, *tail], len(head)


def _from_instruction(fields: dict[str, Any]) -> tuple[list[Message], int]:
    question = plain_text(fields["instruction"], "instruction")
    extra = fields.get("input")
    if extra is not None and extra != "":
        is_blank = isinstance(extra, str) and not extra.strip()
        question = question if is_blank else f"{question}\n\n{plain_text(extra, 'input')}"
    return [a_message("user", question), a_message("assistant", answer_text(fields["output"], "output"))], 0


def _from_question(fields: dict[str, Any]) -> tuple[list[Message], int]:
    question = plain_text(fields["question"], "question")
    return [a_message("user", question), a_message("assistant", answer_text(fields["answer"], "answer"))], 0


_MAKERS = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "prompt-completion": lambda fields: _from_prompt(fields, "completion"),
    "prompt-demonstration": lambda fields: _from_prompt(fields, "demonstration"),
    "instruction": _from_instruction,
    "question-answer": _from_question,
}


def check_turns(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise RowRejected(f"the conversation ends with the {roles[-1]}, not with the assistant")
    if roles[0] == "assistant":
        raise RowRejected("the conversation starts with the assistant: there is nothing to answer")
