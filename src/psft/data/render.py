"""Turns conversations into token ids and labels: the chat template's text, with the assistant's turns trained.

Which tokens are trained. In every assistant turn: all that the model has to write itself, which is what follows the
generation prompt, up to and including the turn's end token (`<|im_end|>`, `<|eot_id|>`, ...). A newline that the
template writes after the end token is not trained. A template that closes no turn gets `eos_token` after each answer.

How a turn is found. The conversation up to the turn is rendered with its generation prompt; it must be a prefix of
the whole rendering, followed by the answer. A probe conversation checks that once per tokenizer. Templates that
rewrite earlier turns (Qwen3 drops thinking) fail it; for them the `{% generation %}` marks say which text is trained,
in the template itself or in TRL's training version of it.

Special-token strings that a row holds are text (see `control_tokens`): a control token is what the template writes. In
the plain text format the text is the person's own rendering; special tokens in it are meant, and become control tokens.

How text becomes ids. Prompt and answer are tokenised apart, as they are when the model generates, so that no token
reaches over the boundary ("\\n" + "\\nHello" would otherwise merge). For tokenizers that put a space before every
piece (old Llama, SentencePiece) the whole text is tokenised and character offsets decide.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from psft.data.control_tokens import ControlTokens, outside
from psft.data.rows import Conversation, RowRejected
from psft.data.templates import render_chat, render_marked, within_limits
from psft.errors import RequestError, shown
from psft.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[str, bool]  # text, is it trained
Encoded = tuple[list[int], list[int]]  # ids, labels
Span = tuple[int, int, bool]  # first character, end, must the end token be put in after it

_PROBE = (
    {"role": "user", "content": "Probe question one?"},
    {"role": "assistant", "content": "Probe answer one."},
    {"role": "user", "content": "Probe question two?"},
    {"role": "assistant", "content": "Probe answer two."},
)
_THINKING_PROBE = (
    _PROBE[0],
    {"role": "assistant", "content": "<think>\nProbe thought.\n</think>\n\nProbe answer one."},
    *_PROBE[2:],
)
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINK_TAG = re.compile(r"</?think>")


class _UnstableTemplate(Exception):
    """The chat template writes an earlier turn differently once later turns follow."""


@dataclass(frozen=True)
class Rendered:
    """A row as text: its pieces in order, cut where training starts and stops.

    quotes: private-use characters in the pieces, and the special token's string that each stands for; the row holds
    that string itself, so it is text.
    """

    pieces: list[Piece]
    quotes: dict[str, str] = field(default_factory=dict)


class TextRenderer:
    """Plain text, and prompt/answer pairs for a tokenizer without chat template: concatenation and `eos_token`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.end_token = _require_eos(tokenizer)
        self.control_tokens = ControlTokens(tokenizer)

    def pieces(self, conversation: Conversation) -> Rendered:
        """The text in order, cut where training starts and stops."""
        if conversation.text is not None:
            text = conversation.text
            return Rendered([(text if text.endswith(self.end_token) else text + self.end_token, True)])
        if len(conversation.messages) > 2:
            raise RowRejected("several turns need a chat template", "the tokenizer has none")
        contents = [message["content"] for message in conversation.messages]
        (prompt, answer), quotes = self.control_tokens.quote(contents)
        return Rendered([(prompt, False), (answer + self.end_token, True)], quotes)


class ChatRenderer:
    """Conversations through the tokenizer's chat template. `end_token` is what closes an answer and is trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = _chat_template(tokenizer)
        self._marked_template = self._template if _GENERATION_MARK.search(self._template) else None
        self._header = ""  # special token that opens a turn, and that some marks wrongly take in
        self._lead = ""  # what the template puts between generation prompt and answer
        self._is_lead_header = False
        try:
            self._learn()
            cause = self._why_unstable(_THINKING_PROBE)
        except _UnstableTemplate as error:
            cause, self.end_token = error, ""
        if cause is not None and (marked := _trl_training_template(tokenizer)) is not None:
            self._marked_template = marked
            try:
                self._learn()
            except _UnstableTemplate as error:
                cause, self.end_token = error, ""
        if not self.end_token:
            raise RequestError(
                f"the tokenizer's chat template cannot be used to tell which tokens are the answer: {cause}. Give a "
                "template with {% generation %} marks around the answers with chat_template_path."
            )
        written = outside(self._render(list(_PROBE))[0], (message["content"] for message in _PROBE))
        self.control_tokens = ControlTokens(tokenizer, written)

    def pieces(self, conversation: Conversation) -> Rendered:
        """The rendered text in order, cut where training starts and stops.

        Raises:
            RowRejected: the template refuses the conversation or changes an answer.
            RequestError: the template had to be stopped.
        """
        contents = [message["content"] for message in conversation.messages]
        contents, quotes = self.control_tokens.quote(contents, avoid=self._template)
        messages = [
            {**message, "content": content} for message, content in zip(conversation.messages, contents, strict=True)
        ]
        try:
            text, spans = self._render(messages)
        except RequestError:
            raise
        except _UnstableTemplate as error:
            raise RowRejected("the chat template changes an answer", str(error)) from error
        except Exception as error:  # jinja2 errors, and whatever a template raises on purpose
            raise RowRejected("the chat template refuses the conversation", _one_line(error)) from error
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [span for turn, span in zip(turns, spans, strict=True) if turn >= conversation.first_trained]
        pieces: list[Piece] = []
        position = 0
        for start, end, needs_end in trained:
            pieces.append((text[position:start], False))
            pieces.append((text[start:end] + (self.end_token if needs_end else ""), True))
            position = end
        return Rendered([piece for piece in (*pieces, (text[position:], False)) if piece[0]], quotes)

    def _learn(self) -> None:
        """Find the end token and the lead from the probe conversation."""
        self.end_token = ""
        probe = list(_PROBE)
        try:
            text, spans = self._render(probe)
        except (_UnstableTemplate, RequestError):
            raise
        except Exception as error:
            raise RequestError(
                f"the tokenizer's chat template cannot be used: {_one_line(error)}. "
                "Give another with chat_template_path."
            ) from error
        answer = text.rfind(probe[-1]["content"]) + len(probe[-1]["content"])
        self.end_token = _special_at_start(self._tokenizer, text[answer:]) or _require_eos(self._tokenizer)
        opening = self._apply(probe[:1], add_generation_prompt=True)[len(self._apply(probe[:1])) :]
        self._header = _special_at_start(self._tokenizer, opening) or ""
        self._render(probe)

    def _why_unstable(self, messages: Sequence[dict[str, str]]) -> Exception | None:
        try:
            self._render(list(messages))
        except _UnstableTemplate as error:
            return error
        return None

    def _render(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        if self._marked_template is not None:
            return self._render_marked(messages, self._marked_template)
        text = self._apply(messages)
        is_probe = not self.end_token
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(self._find_turn(text, messages[:index], message["content"], is_probe and not spans))
        return text, spans

    def _find_turn(self, text: str, before: list[dict[str, str]], answer: str, learn_lead: bool) -> Span:
        prefix = self._apply(before, add_generation_prompt=True)
        if not text.startswith(prefix):
            raise _UnstableTemplate("the text before it is not a prefix of the whole")
        start = len(prefix)
        if learn_lead:
            found = text.find(answer, start)
            if found < 0:
                raise _UnstableTemplate("the answer is not in the rendered text")
            self._lead = text[start:found]
            self._is_lead_header = bool(self._lead.strip()) and prefix == self._apply(before)
        if not text.startswith(self._lead, start):
            raise _UnstableTemplate("another text stands before the answer than usual")
        at = start + len(self._lead)
        written = next((form for form in (answer, answer.rstrip(), answer.strip()) if text.startswith(form, at)), None)
        if written is None:
            raise _UnstableTemplate("the answer is not written as it was given")
        return self._with_end(text, at if self._is_lead_header else start, at + len(written))

    def _with_end(self, text: str, start: int, end: int) -> Span:
        """Extend a span over its end token, or note that there is none."""
        closing = len(text[end:]) - len(text[end:].lstrip()) + end
        if self.end_token and text.startswith(self.end_token, closing):
            return start, closing + len(self.end_token), False
        return start, end, True

    def _render_marked(self, messages: list[dict[str, str]], template: str) -> tuple[str, list[Span]]:
        text, marks = render_marked(self._tokenizer, template, messages)
        spans: list[Span] = []
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if len(marks) != len(answers):
            raise _UnstableTemplate("the template marks another number of answers")
        for (start, end), answer in zip(marks, answers, strict=True):
            if self._header and text.startswith(self._header, start):
                start += len(self._header)
            body = text[start:end].rstrip()
            if not all(part.strip() in text[start:end] for part in _THINK_TAG.split(answer)):
                raise _UnstableTemplate("a part of the answer is not in the rendered text")
            if self.end_token and body.endswith(self.end_token):
                spans.append((start, start + len(body), False))
            else:
                spans.append(self._with_end(text, start, end))
        if any(one[1] > other[0] for one, other in pairwise(spans)):
            raise _UnstableTemplate("the template's marks lie in each other")
        return text, spans

    def _apply(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        return render_chat(self._tokenizer, messages, add_generation_prompt=add_generation_prompt)


class Encoder:
    """Pieces to ids and labels; `labels` are aligned with `input_ids`, -100 where nothing is trained."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, control_tokens: ControlTokens, probe: Rendered, *, add_bos: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._control_tokens = control_tokens
        whole = self._ids(["".join(text for text, _ in probe.pieces)])[0]
        self._by_piece = [id for ids in self._ids([text for text, _ in probe.pieces]) for id in ids] == whole
        if not self._by_piece and not tokenizer.is_fast:
            raise RequestError(
                "this tokenizer has no fast version, which is needed to place the loss mask. Convert it."
            )
        self._bos = _bos_ids(tokenizer) if add_bos else []
        self._kept: set[str] = set()  # characters that were seen to reach the tokens

    def encode(self, rows: Sequence[Rendered]) -> list[Encoded | RowRejected]:
        """Ids and labels of each row, or why it has none.

        The first token is never trained: nothing comes before it to predict it from.
        """
        ordinary = [row.pieces for row in rows if not row.quotes]
        encoded = iter(self._encode_pieces(ordinary) if self._by_piece else map(self._encode_whole, ordinary))
        found = [self._encode_quoted(row) if row.quotes else next(encoded) for row in rows]
        for item in found:
            if isinstance(item, RowRejected):
                continue
            ids, labels = item
            ids[:0], labels[:0] = self._bos, [IGNORE_INDEX] * len(self._bos)
            if labels:
                labels[0] = IGNORE_INDEX
        return found

    def require_kept(self, conversation: Conversation) -> None:
        """Every character of the conversation reaches the tokens.

        Raises:
            RowRejected: the tokenizer drops a character, or has only its token for unknown ones: some byte-level
                vocabularies lack control characters, older ones whole scripts.
        """
        contents = [message["content"] for message in conversation.messages]
        contents = contents if conversation.text is None else [conversation.text]
        unseen = sorted(set[str]().union(*contents) - self._kept)
        if not unseen:
            return
        without, *each = self._ids(["aa", *(f"a{letter}a" for letter in unseen)])
        unknown = self._tokenizer.unk_token_id
        for letter, ids in zip(unseen, each, strict=True):
            if ids == without or unknown in ids:
                raise RowRejected("a character that the tokenizer does not have", f"U+{ord(letter):04X}")
            self._kept.add(letter)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_pieces(self, rows: Sequence[Sequence[Piece]]) -> list[Encoded]:
        texts = [text for row in rows for text, _ in row]
        piece_ids = iter(self._ids(texts) if texts else [])
        return [_joined((next(piece_ids), is_trained) for _, is_trained in row) for row in rows]

    def _encode_whole(self, row: Sequence[Piece]) -> Encoded:
        text = "".join(piece for piece, _ in row)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return _masked(found["input_ids"], found["offset_mapping"], row)

    def _encode_quoted(self, row: Rendered) -> Encoded | RowRejected:
        tokens = self._control_tokens
        try:
            renamed = [(tokens.rename(text, row.quotes), is_trained) for text, is_trained in row.pieces]
            if self._by_piece:
                return _joined((tokens.encode(text)[0], is_trained) for text, is_trained in renamed)
            return _masked(*tokens.encode("".join(text for text, _ in renamed)), renamed)
        except RowRejected as rejected:
            return rejected


def _joined(pieces: Iterable[tuple[list[int], bool]]) -> Encoded:
    """Ids and labels of pieces that were tokenised apart."""
    ids: list[int] = []
    labels: list[int] = []
    for piece, is_trained in pieces:
        ids += piece
        labels += piece if is_trained else [IGNORE_INDEX] * len(piece)
    return ids, labels


def _masked(ids: Sequence[int], offsets: Sequence[tuple[int, int]], row: Sequence[Piece]) -> Encoded:
    """Ids and labels of pieces that were tokenised together: trained is what lies inside a trained piece."""
    spans, position = [], 0
    for piece, is_trained in row:
        if is_trained:
            spans.append((position, position + len(piece)))
        position += len(piece)
    starts = [start for start, _ in spans]
    labels = []
    for id, (start, end) in zip(ids, offsets, strict=True):
        found = bisect_right(starts, start) - 1
        labels.append(id if found >= 0 and end <= spans[found][1] else IGNORE_INDEX)
    return list(ids), labels


def make_renderer(tokenizer: PreTrainedTokenizerBase, format_name: str) -> tuple[TextRenderer | ChatRenderer, Encoder]:
    """How rows of this format are rendered and encoded with this tokenizer.

    Raises:
        RequestError: chat data without a chat template, a template that cannot be used, or no end token.
    """
    if format_name != "text" and tokenizer.chat_template:
        chat = ChatRenderer(tokenizer)
        _require_single_token(tokenizer, chat.end_token)
        return chat, Encoder(tokenizer, chat.control_tokens, chat.pieces(Conversation(_PROBE)), add_bos=False)
    if format_name in ("messages", "conversations"):
        raise RequestError(
            f"the data are chats (format {format_name}) but the tokenizer has no chat template. "
            "Use the instruct model's tokenizer, or give one with chat_template_path."
        )
    text = TextRenderer(tokenizer)
    _require_single_token(tokenizer, text.end_token)
    return text, Encoder(tokenizer, text.control_tokens, text.pieces(Conversation(_PROBE[:2])), add_bos=True)


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several templates by name, none of them the default
        raise RequestError(
            f"the tokenizer's chat template cannot be used: {_one_line(error)}. Give one with chat_template_path."
        ) from error


def _trl_training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        with within_limits():
            return get_training_chat_template(tokenizer)
    except RequestError:
        raise
    except Exception:  # TRL knows no training version of this template, or the template fails in TRL's trials
        return None


def _special_at_start(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    known = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    text = text.lstrip()
    return max((token for token in known if token and text.startswith(token)), key=len, default=None)


def _require_eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.eos_token:
        raise RequestError("the tokenizer has no eos_token, so an answer cannot be ended. Set eos_token in its config.")
    return tokenizer.eos_token


def _require_single_token(tokenizer: PreTrainedTokenizerBase, end_token: str) -> None:
    ids = tokenizer(end_token, add_special_tokens=False)["input_ids"]
    if ids[-1:] != [tokenizer.convert_tokens_to_ids(end_token)]:
        raise RequestError(
            f"the end token {end_token!r} is no single token of the tokenizer. Check its special tokens."
        )


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first = tokenizer("a")["input_ids"][:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def _one_line(error: BaseException, limit: int = 200) -> str:
    return shown(" ".join(f"{type(error).__name__}: {error}".split()), limit).rstrip(".")


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of some ids as it stands, special tokens shown."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
