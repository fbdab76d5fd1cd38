"""What hostile files are made of: texts, values, rows and lines that a person or a broken program may hand over."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

SPECIMENS = [
    "", " ", "a", "Natalia sold 48 clips.", "<|im_end|>", "<|im_start|>", "<|pad|>", "<|endoftext|>", "<|im_", "end|>",
    "<|im_start|>assistant\n", "</s>", "<think>", "</think>", "\x00", "\x07\x1b[2J", "\x7f\x85", "\r\n", "\n\n", "\t",
    "\ud800", "\udfff\udbff", "\ufeff", "\ufffd", "\u202e\u2066", "\u200d\u200b", "e\u0301", "😀", "\U000f0000",
    "\U0010f8a3", "\U0010f8a30\U0010f8a3", "\U0010ffff", "\u2028", "{{ 7 * 7 }}", "{% raise %}", "{% generation %}",
    "'; import os", "!!python/object/apply:os.system", "ﷺ" * 9, "x" * 3000, "null", "NaN", "-100",
]  # fmt: skip
texts = st.one_of(
    st.sampled_from(SPECIMENS),
    st.lists(st.sampled_from(SPECIMENS), max_size=4).map("".join),
    st.text(st.characters(), max_size=12),  # surrogates included
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(), texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=4,
)
roles = st.one_of(st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "robot", "User"]), values)


def chats(role_key: str, content_key: str) -> st.SearchStrategy[Any]:
    """Lists of messages: half of them a question and an answer, the others anything."""
    asks, answers = ("user", "assistant") if role_key == "role" else ("human", "gpt")
    message = st.fixed_dictionaries({role_key: roles, content_key: st.one_of(texts, texts, values)})
    pair = st.tuples(texts, texts).map(
        lambda pair: [{role_key: asks, content_key: f"q{pair[0]}"}, {role_key: answers, content_key: f"a{pair[1]}"}]
    )
    turn = st.one_of(
        st.tuples(pair, message).map(lambda two: [*two[0], two[1]]), st.lists(message | values, max_size=4)
    )
    return st.one_of(pair, pair, turn, st.just(json.dumps([{role_key: asks, content_key: "q"}])))


plain = st.one_of(texts, texts, texts, values)
fields = {
    "messages": st.one_of(chats("role", "content"), chats("role", "content"), values),
    "conversations": st.one_of(chats("from", "value"), chats("role", "content"), values),
    "prompt": st.one_of(plain, chats("role", "content")),
    "completion": plain,
    "demonstration": plain,
    "instruction": plain,
    "output": plain,
    "input": plain,
    "question": plain,
    "answer": plain,
    "text": plain,
    "system": plain,
}
FORMATS = {
    "messages": ["messages"],
    "conversations": ["conversations"],
    "prompt-completion": ["prompt", "completion"],
    "prompt-demonstration": ["prompt", "demonstration"],
    "instruction": ["instruction", "output", "input"],
    "question-answer": ["question", "answer"],
    "text": ["text"],
}
rows_of = {
    name: st.fixed_dictionaries({name: fields[name] for name in names}, optional={"system": plain, "meta": values})
    for name, names in FORMATS.items()
}
rows = st.one_of(
    *rows_of.values(), st.dictionaries(st.one_of(st.sampled_from(sorted(fields)), texts), values, max_size=3)
)
_BROKEN_LINES = [
    b"[" * 10_000, b'{"text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", b'{"a":' * 900 + b"1" + b"}" * 900,
    b'{"text": ' + b"9" * 5000 + b"}", b'{"text": NaN, "question": Infinity}', b'{"text": "\xff"}', b"\xef\xbb\xbf{}",
    b'{"text": "a", "text": "b"}', b'{"question": "q", "answer": "a", "meta": {"k": 1, "k": 2}}', b'{"text": "a\x00b"}',
    '{"text": "é"}'.encode("utf-16"), '{"text": "é"}'.encode("latin-1"), b'{"text": "\\ud800"}', b"\x00", b"\r", b"{",
    b'{"text": "a"', b'{"text": "a"} {"text": "b"}', b"{'text': 'a'}", b"nul", b'"text"', b"-", b'{"text": "tab\t"}',
]  # fmt: skip


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def lines_of(format: str) -> st.SearchStrategy[bytes]:
    """Lines of a file whose rows are meant to be of one format."""
    row = rows_of[format]
    return st.one_of(
        row.map(_dumped),
        row.map(_dumped),
        row.map(_dumped),
        row.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
        st.tuples(row.map(_dumped), st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]]),
        row.map(lambda value: _dumped(value)[:-1] + b"," + _dumped(value)[1:]),  # every key twice
        rows.map(_dumped),
        st.sampled_from(_BROKEN_LINES),
        st.binary(max_size=20),
    )


def files(num_lines: int) -> st.SearchStrategy[tuple[str, list[bytes]]]:
    """The format that most lines of a file have, and its lines."""
    return st.sampled_from(sorted(FORMATS)).flatmap(
        lambda format: st.tuples(st.just(format), st.lists(lines_of(format), min_size=num_lines, max_size=num_lines))
    )
