"""General prompts for the retention probe: the ones written for psft, or a file of the user's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from psft.data.rows import Row
from psft.data.sources import read_rows
from psft.data.templates import render_chat
from psft.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_KIND = "prompts"
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ProbePrompt:
    """One prompt: messages that end with a user's turn, and its kind, by which drift is reported."""

    kind: str
    messages: tuple[dict[str, str], ...]
    where: str


def load_probe_prompts(path: str | None = None) -> list[ProbePrompt]:
    """The bundled prompts (84 of 8 kinds, 11 languages besides English), or those of a file.

    Args:
        path: .jsonl, .json, .csv or .parquet with a field `prompt` (text), or `messages` that end with a user's turn;
            `kind` is optional.
    Raises:
        RequestError: the file cannot be read, holds no prompt, or a row is none; the message names file and line.
    """
    if path is None:
        text = resources.files("psft.data").joinpath("probe_prompts.jsonl").read_text(encoding="utf-8")
        rows = [Row("probe_prompts.jsonl", i, json.loads(line)) for i, line in enumerate(text.splitlines(), start=1)]
    else:
        rows = list(read_rows(path))
    prompts = [_prompt(row) for row in rows]
    if not prompts:
        raise RequestError(f"probe_prompts={path}: no row in it. Give prompts, or leave it out for the bundled ones.")
    if any(prompt.kind == "all" for prompt in prompts):
        raise RequestError(f"probe_prompts={path}: the kind 'all' is what all prompts together are called. Rename it.")
    return prompts


def encode_probe_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[ProbePrompt]) -> list[list[int]]:
    """Token ids of each prompt, ready to be answered: by the chat template, or as plain text where there is none."""
    encoded = []
    for prompt in prompts:
        if tokenizer.chat_template:
            text = render_chat(tokenizer, list(prompt.messages), add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer("\n".join(message["content"] for message in prompt.messages) + "\n")["input_ids"]
        if not ids:
            raise RequestError(f"{prompt.where}: the prompt has no token for this tokenizer. Remove it.")
        encoded.append([int(i) for i in ids])
    return encoded


def _prompt(row: Row) -> ProbePrompt:
    value: Any = row.value
    if row.problem is not None or not isinstance(value, dict):
        raise RequestError(f"{row.where}: {row.problem or 'a row must be an object'}. Give {{'prompt': TEXT}}.")
    kind, prompt, messages = value.get("kind", DEFAULT_KIND), value.get("prompt"), value.get("messages")
    if not isinstance(kind, str) or not kind.strip():
        raise RequestError(f"{row.where}: 'kind' must be text, a group that drift is reported by. Remove or name it.")
    if messages is None:
        messages = [{"role": "user", "content": prompt}]
    is_conversation = isinstance(messages, list) and bool(messages)
    if not is_conversation or not all(
        isinstance(m, dict) and m.get("role") in _ROLES and isinstance(m.get("content"), str) and m["content"].strip()
        for m in messages
    ):
        raise RequestError(
            f"{row.where}: no prompt here. Give 'prompt' (text), or 'messages' with role and content in each."
        )
    if messages[-1]["role"] != "user":
        raise RequestError(f"{row.where}: 'messages' must end with role 'user', for the model to answer. Cut the rest.")
    turns = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    return ProbePrompt(kind.strip(), turns, row.where)
