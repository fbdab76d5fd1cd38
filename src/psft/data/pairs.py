"""A row of preference data becomes two conversations that part at the last answer, or `RowRejected` says why not."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psft.data.formats import Format
from psft.data.rows import Conversation, Row, RowRejected
from psft.data.validate import (
    Message,
    a_message,
    answer_text,
    check_turns,
    fields_of,
    is_message_list,
    message_list,
    plain_text,
    with_system,
    without_empty_system,
)

TEXTS = Format("chosen-rejected-text", ("chosen", "rejected"))
"""Two whole texts: what `chosen-rejected` turns out to be where its fields hold text."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with the better and the worse answer. Only the last turn of each is trained."""

    chosen: Conversation
    rejected: Conversation


def to_pair(
    row: Row, format: Format, *, columns: Mapping[str, str] | None = None, system_prompt: str | None = None
) -> Pair:
    """Check one row and bring it into the common form.

    `chosen` and `rejected` are each an answer (text, or messages) to `prompt`, or a whole conversation with the prompt
    in it; a `prompt` beside whole conversations must be a part of them.

    Raises:
        RowRejected: what `to_conversation` rejects; answers to different prompts, or twice the same answer.
    """
    fields = fields_of(row, format, columns)
    if format.name == TEXTS.name:
        return _from_texts(fields)
    chosen, rejected = (_conversation(fields, name, system_prompt) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        parted = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
        raise RowRejected("chosen and rejected do not answer the same prompt", f"they part at message {parted + 1}")
    if chosen == rejected:
        raise RowRejected("chosen and rejected are the same answer")
    return Pair(Conversation(tuple(chosen), len(chosen) - 1), Conversation(tuple(rejected), len(rejected) - 1))


def _conversation(fields: Mapping[str, Any], name: str, system_prompt: str | None) -> list[Message]:
    """Prompt and answer of one side, as messages that end with the answer."""
    value, prompt = fields[name], fields.get("prompt")
    if prompt is None or is_message_list(value):
        answer = without_empty_system(message_list(value, name))
    else:
        answer = [a_message("assistant", answer_text(value, name))]
    if prompt is None:
        messages = answer
    else:
        head = message_list(prompt, "prompt") if is_message_list(prompt) else [_question(prompt)]
        head = without_empty_system(head)
        is_whole = bool(answer) and answer[0]["role"] != "assistant"
        if is_whole and not _is_part(head, answer[:-1]):
            raise RowRejected(f"'{name}' is a conversation without the row's 'prompt'")
        messages = answer if is_whole else [*head, *answer]
    if not messages:
        raise RowRejected("the conversation has no turn")
    messages = with_system(messages, fields, system_prompt)
    check_turns(messages)
    return messages


def _question(prompt: Any) -> Message:
    return a_message("user", plain_text(prompt, "prompt"))


def _is_part(head: list[Message], conversation: list[Message]) -> bool:
    return all(message in conversation for message in head)


def _from_texts(fields: Mapping[str, Any]) -> Pair:
    """Two texts: what they share, back to the last space, is the prompt. Tokens they share beyond it cancel anyway."""
    texts = [answer_text(fields[name], name) for name in ("chosen", "rejected")]
    if texts[0] == texts[1]:
        raise RowRejected("chosen and rejected are the same answer")
    shared = os.path.commonprefix(texts)
    end = max((i for i, letter in enumerate(shared) if letter.isspace()), default=0)
    prompt, answers = shared[:end], [text[end:] for text in texts]
    if not prompt.strip():
        raise RowRejected("chosen and rejected share no prompt", "two texts must begin alike")
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer.strip():
            raise RowRejected("empty answer", f"field '{name}'")
    chosen, rejected = (
        Conversation((a_message("user", prompt), a_message("assistant", answer)), 1) for answer in answers
    )
    return Pair(chosen, rejected)
