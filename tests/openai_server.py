"""A server of OpenAI's protocol that breaks as it is told to."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: str | None, finish_reason: str | None = "stop", tokens: int | None = 3) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode()


class FakeServer(ThreadingHTTPServer):
    """Answers the n-th try of a request as `script(n, body)` says: (status, headers, bytes), or a word for a fault."""

    daemon_threads = True

    def __init__(self, script: Callable[[int, dict[str, Any]], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.tries, self.bodies, self.lock = script, Counter(), [], threading.Lock()
        self.headers_seen: list[dict[str, str]] = []
        self.clients: set[Any] = set()  # address and port: one a connection
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hung up is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            name = (body["messages"][0]["content"], body["seed"])
            self.server.tries[name] += 1
            attempt = self.server.tries[name]
            self.server.bodies.append(body)
            self.server.headers_seen.append(dict(self.headers))
            self.server.clients.add(self.client_address)
        made = self.server.script(attempt, body)
        if isinstance(made, str):
            self.close_connection = True
            getattr(self, made)()
            return
        status, headers, content = made
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def nothing(self):
        """Hangs up without a word."""

    def silence(self):
        """Holds the line and says nothing."""
        threading.Event().wait(3)

    def drip(self):
        """A byte now and then, for ever."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        for _ in range(60):
            self.wfile.write(b" ")
            threading.Event().wait(0.05)

    def half(self):
        whole = completion("half of an answer")
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole[: len(whole) // 2])


FAULTS = [
    (429, {"Retry-After": "7"}, b'{"error": {"message": "slow down"}}'),
    (500, {}, b"<html>oops</html>"),
    (200, {}, b"garbage"),
    "half",
    "nothing",
    (200, {}, completion(None)),
    (200, {}, b'{"choices": []}'),
    (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b""),
]
"""A status, headers and body each, or the name of a method of `Handler`."""
