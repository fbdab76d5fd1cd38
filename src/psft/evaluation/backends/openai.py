"""Any server that speaks OpenAI's chat-completions protocol: vLLM, SGLang, llama.cpp, a hosted one.

One request per sample, many at a time. A request is repeated with growing pauses when the server is busy or broken:
408, 409, 425, 429, 5xx, a time-out, a lost connection, an answer that is no JSON, half of one, or one without text or
finish_reason. `Retry-After` is obeyed. What the server refuses for good (another 4xx) is not repeated: a wrong key or
model ends the evaluation, a refused prompt is a failure of that sample. A sample without an answer is never kept as an
empty one.

What can go wrong elsewhere: servers fill in what a request does not say. `vllm serve` takes top_k and
repetition_penalty from the model's generation_config.json; say them with `--request_extra`.
"""

from __future__ import annotations

import json
import queue
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from psft.errors import RequestError, RunFailed, shown
from psft.evaluation.backends.base import Answer, Description, Failure, Outcome, Request
from psft.evaluation.backends.http import Connection, Refused, TryAgain, check_url

HOPELESS = 20
"""Failures without one answer after which the server is given up."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LONGEST_RETRY_AFTER_S = 1.0, 60.0, 600.0


@dataclass(frozen=True)
class Server:
    """Where and how to ask.

    base_url: up to and with `/v1`. timeout_s: for one whole request. max_retries: repetitions after the first try.
    extra: fields added to each request, as `{"top_k": -1}`. pause: waits so many seconds; None = the clock does.

    Raises:
        RequestError: no URL, or a number out of range.
    """

    base_url: str
    model: str
    api_key: str | None = None
    concurrency: int = 32
    timeout_s: float = 1800.0
    max_retries: int = 8
    extra: Mapping[str, Any] = field(default_factory=dict)
    pause: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        check_url(self.base_url)
        if self.concurrency < 1 or self.max_retries < 0 or not self.timeout_s > 0:
            raise RequestError("--concurrency and --request_timeout must be above 0, --max_retries 0 or more.")


class OpenAIBackend:
    """Threads that each hold one connection; answers come back in the order they arrive."""

    name = "openai"

    def __init__(self, server: Server) -> None:
        self.server = server
        self._stop = threading.Event()

    @property
    def numerics(self) -> str:
        return "openai" + (json.dumps(dict(self.server.extra), sort_keys=True) if self.server.extra else "")

    def describe(self) -> Description:
        settings = {
            "concurrency": self.server.concurrency,
            "timeout_s": self.server.timeout_s,
            "max_retries": self.server.max_retries,
            "extra": dict(self.server.extra),
        }
        notes = ["the server's weights are known by name only", "a server may add settings of its own to a request"]
        return Description(self.name, settings, notes)

    def generate(self, requests: Sequence[Request], done: Collection[str]) -> Iterator[list[Outcome]]:
        """See `Backend.generate`.

        Raises:
            RequestError: the server refuses the key or does not know the model or the address.
            RunFailed: `HOPELESS` requests failed and none was answered.
        """
        wanted = [request for request in requests if request.key not in done]
        todo: queue.SimpleQueue[Request] = queue.SimpleQueue()
        for request in wanted:
            todo.put(request)
        answers: queue.SimpleQueue[tuple[Request, Any]] = queue.SimpleQueue()
        self._stop.clear()
        for _ in range(min(self.server.concurrency, len(wanted))):
            threading.Thread(target=self._work, args=(todo, answers), daemon=True).start()
        num_failed = num_answered = 0
        try:
            for _ in wanted:
                request, outcome = answers.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield [(request, outcome)]
                if not isinstance(outcome, Failure):
                    num_answered += 1
                    continue
                num_failed += 1
                if num_failed >= HOPELESS and not num_answered:
                    raise RunFailed(
                        f"{self.server.base_url} answered none of {num_failed} requests; the last: {outcome.reason}. "
                        "Look at the server; the same command goes on from here."
                    )
        finally:
            self._stop.set()

    def close(self) -> None:
        """Threads end after the request they wait for; the process does not wait for them."""
        self._stop.set()

    def _work(self, todo: queue.SimpleQueue[Request], answers: queue.SimpleQueue[tuple[Request, Any]]) -> None:
        connection = Connection(self.server.base_url, self.server.api_key, self.server.timeout_s)
        while not self._stop.is_set():
            try:
                request = todo.get_nowait()
            except queue.Empty:
                break
            try:
                outcome: Any = self._ask(connection, request)
            except BaseException as error:  # the main thread raises it
                outcome = error
            answers.put((request, outcome))
        connection.drop()

    def _ask(self, connection: Connection, request: Request) -> Answer | Failure:
        body = json.dumps(self._body(request)).encode()
        reason, num_tries = "", 0
        for attempt in range(self.server.max_retries + 1):
            num_tries += 1
            try:
                return read_answer(connection.post(body))
            except Refused as error:
                if error.is_fatal:
                    raise RequestError(
                        f"{self.server.base_url} {error}. Check --base_url, the model's name and the key."
                    ) from None
                return Failure(str(error))
            except TryAgain as error:
                connection.drop()
                reason = str(error)
                is_last = attempt == self.server.max_retries
                if is_last or not self._pause(attempt, error.after_s):
                    break
        return Failure(f"{reason} ({num_tries} tries)")

    def _pause(self, attempt: int, after_s: float | None) -> bool:
        """Wait before the next try, longer each time, not all threads at once; False: stopped meanwhile."""
        pause_s = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
        if after_s is not None:
            pause_s = max(pause_s, min(after_s, _LONGEST_RETRY_AFTER_S))
        if self.server.pause is not None:
            self.server.pause(pause_s)
            return not self._stop.is_set()
        return not self._stop.wait(pause_s)

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.server.model,
            "messages": list(request.messages),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
            "n": 1,
            "stream": False,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        return {**body, **self.server.extra}


def read_answer(content: bytes) -> Answer:
    """The answer in a response's body.

    Raises:
        TryAgain: it is not a whole answer.
    """
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        usage = body.get("usage") or {}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        begins = shown(content[:60].decode("latin1"))
        raise TryAgain(f"an answer that is none ({type(error).__name__}): {begins}") from error
    tokens = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    tokens = tokens if isinstance(tokens, int) else None
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise TryAgain(f"an answer without text or end (finish_reason {shown(reason, 40)})")
    if not text and not tokens:  # an empty answer counts only if the model is known to have said so
        raise TryAgain("an empty answer")
    return Answer(text, reason, tokens)
