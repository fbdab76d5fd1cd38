"""Special-token strings in demonstrations stay text: only what a chat template writes becomes a control token.

A tokenizer turns the characters `<|im_end|>` into the token that ends a turn wherever they stand, in a question about
chat templates as well. So the strings of control tokens are taken out of the contents before the template sees them,
each for one private-use character ("quoted"), and what then still stands in the rendered text is the template's own.

How a row with such strings is tokenised: by a copy of the tokenizer in which every control token has another name. The
template's control tokens are written under the new names and the contents put back as they were, so the copy sees
ordinary text where the person wrote ordinary text, with all of its neighbours; its ids are those of the tokenizer.
A row without such strings never meets the copy.

Control tokens are the tokenizer's special tokens, those named in its `chat_control_tokens`, and other added tokens that
the template writes around every conversation (DeepSeek's turn marks are not marked special). Thinking tags are none:
demonstrations hold them on purpose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from psft.data.rows import RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\U0010f8a3"  # private use; encloses the new name of a control token
_FIRST_QUOTE = 0xF0000  # private use; quotes are taken from here on, leaving out what a row or template holds itself
_NO_CONTROL = {"<think>", "</think>"}


class ControlTokens:
    """The control tokens of a tokenizer, how to quote them in contents, and the copy that reads quoted text.

    Args:
        written: what a template writes around a conversation, its contents left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: str = "") -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
        strings = {token.content for token in added if token.special or token.content in named}
        strings |= {token.content for token in added if token.content in written and _looks_like_a_mark(token.content)}
        self.strings = sorted((text for text in strings - _NO_CONTROL if text.strip()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self.strings)) or "(?!)")
        self._names = {text: f"{_MARK}{number}{_MARK}" for number, text in enumerate(self.strings)}
        self._copy: Any = None
        self._ids: dict[int, int] = {}  # id in the copy -> id in the tokenizer
        self._leaks: set[int] = set()  # ids in the copy that a text must not give

    def quote(self, contents: Sequence[str], avoid: str = "") -> tuple[list[str], dict[str, str]]:
        """The contents with each control token's string as one private-use character, and what each of those means.

        Args:
            avoid: more text whose characters cannot be taken for this.
        Raises:
            RowRejected: the contents leave no character over.
        """
        found = sorted({match for content in contents for match in self._pattern.findall(content)})
        if not found:
            return list(contents), {}
        taken = set(avoid).union(*contents)
        free = (chr(code) for code in range(_FIRST_QUOTE, 0x10FFFE) if chr(code) not in taken)
        quotes = dict(zip(found, free, strict=False))
        if len(quotes) < len(found):
            raise RowRejected("a special token's string beside a private-use character", "every one that there is")
        quoted = [self._pattern.sub(lambda match: quotes[match.group()], content) for content in contents]
        return quoted, {quote: text for text, quote in quotes.items()}

    def rename(self, text: str, quotes: dict[str, str]) -> str:
        """What the copy is given for a rendered text: control tokens under their new names, quotes undone.

        Raises:
            RowRejected: the text holds the character that the new names are made with.
        """
        if _MARK in text:
            strings = ", ".join(map(repr, quotes.values()))
            raise RowRejected("a special token's string beside a private-use character", f"{strings} and U+10F8A3")
        renamed = self._pattern.sub(lambda match: self._names[match.group()], text)
        return renamed.translate({ord(quote): original for quote, original in quotes.items()})

    def encode(self, renamed: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of what `rename` gave.

        Raises:
            RowRejected: this tokenizer gives the control token for its string even so, or cannot be copied.
        """
        if self._copy is None:
            self._copy = self._make_copy()
        encoding = self._copy.encode(renamed, add_special_tokens=False) if self._copy is not False else None
        if encoding is None or not self._leaks.isdisjoint(encoding.ids):
            raise RowRejected("a special token's string, which this tokenizer cannot read as text")
        return [self._ids.get(id, id) for id in encoding.ids], encoding.offsets

    def _make_copy(self) -> Any:
        """The backend with control tokens renamed; False where there is none, or it cannot be written and read."""
        from tokenizers import Tokenizer

        if not self._tokenizer.is_fast:
            return False
        original: Any = self._tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        try:
            content = json.loads(original.to_str())
            content["truncation"] = content["padding"] = None
            for token in content["added_tokens"]:
                token["content"] = self._names.get(token["content"], token["content"])
            copy = Tokenizer.from_str(json.dumps(content))
        except Exception:  # tokenizers raises plain Exceptions, for parts written in Python among others
            return False
        originals = {name: text for text, name in self._names.items()}
        self._ids = {
            id: original.token_to_id(originals.get(token.content, token.content))
            for id, token in copy.get_added_tokens_decoder().items()
        }
        control = {original.token_to_id(text) for text in self.strings}
        self._leaks = {id for id in control if id is not None and id not in self._ids}
        return copy


def _looks_like_a_mark(text: str) -> bool:
    return not all(letter.isalnum() or letter.isspace() for letter in text)


def outside(text: str, contents: Iterable[str]) -> str:
    """A rendered text without its contents, a NUL where each was."""
    for content in sorted(contents, key=len, reverse=True):
        text = text.replace(content, "\0")
    return text
