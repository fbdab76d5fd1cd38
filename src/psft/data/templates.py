"""Renders chat templates. They come with model folders and are programs: sandboxed by transformers, bounded here.

transformers compiles every template in Jinja's immutable sandbox: no attribute that starts with an underscore, no
import, no range above 100,000. What the sandbox leaves open is how long a template runs, how much memory it takes and
how much it writes; each rendering is stopped at limits far above what any conversation needs.

The time limit works in the main thread, the memory limit on Linux; elsewhere only the length of the text is bounded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from psft.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]

CPU_LIMIT_S = 10.0  # processor time of one rendering; a real one takes milliseconds
MEMORY_LIMIT = 1 << 28  # bytes beyond those in use, and 64 more for each character of the conversation
OUTPUT_LIMIT = 1 << 20  # characters, and 16 more for each of the conversation
_ADVICE = "Give another template with chat_template_path."


class _OutOfTime(BaseException):  # no Exception: code between the template and us may catch those
    pass


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    """The conversation as the tokenizer's chat template writes it.

    Raises:
        RequestError: the template ran into a limit, or wrote characters that no encoding has.
        Exception: whatever the template raises, on purpose or not.
    """
    apply: Any = tokenizer.apply_chat_template  # its return type depends on `tokenize`, which annotations do not say
    with within_limits(messages):
        text = apply(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    return _checked(text, messages)


def render_marked(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as `template` writes it, and first and end character of each `{% generation %}` block.

    Raises: as `render_chat`.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
    with within_limits(messages):
        found: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **special_tokens,
        )
    (text,), (marks,) = found
    return _checked(text, messages), marks


@contextlib.contextmanager
def within_limits(messages: Messages = ()) -> Iterator[None]:
    """Stops what runs inside with a RequestError once it takes more time or memory than a template may."""
    try:
        with _time_limit(CPU_LIMIT_S), _memory_limit(MEMORY_LIMIT + 64 * _num_chars(messages)):
            yield
    except _OutOfTime:
        raise RequestError(
            f"the chat template was stopped: it ran for {CPU_LIMIT_S:g} s on one conversation. {_ADVICE}"
        ) from None
    except MemoryError:
        raise RequestError(
            f"the chat template was stopped: it took more than {MEMORY_LIMIT >> 20} MiB of memory. {_ADVICE}"
        ) from None


def _num_chars(messages: Messages) -> int:
    return sum(len(message["content"]) for message in messages)


def _checked(text: str, messages: Messages) -> str:
    if len(text) > OUTPUT_LIMIT + 16 * _num_chars(messages):
        raise RequestError(
            f"the chat template was stopped: it wrote {len(text)} characters for a conversation of "
            f"{_num_chars(messages)}. {_ADVICE}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            f"the chat template writes a lone surrogate, a character that no encoding has. {_ADVICE}"
        ) from None
    return text


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises `_OutOfTime` inside after this much processor time of the process."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _OutOfTime

    previous = signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def _memory_limit(num_bytes: int) -> Iterator[None]:
    """Makes an allocation of this much more than the process has now a MemoryError."""
    try:
        import resource

        with open("/proc/self/statm", "rb") as sizes:
            in_use = int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = in_use + num_bytes
    if any(bound != resource.RLIM_INFINITY and bound <= limit for bound in (soft, hard)):
        yield  # a stricter limit is in force
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
