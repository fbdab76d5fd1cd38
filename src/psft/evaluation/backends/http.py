"""One kept-open HTTP connection that posts JSON, with a limit on the whole request. Standard library only.

`http.client` alone times single reads: a server that sends a byte a minute would never be late.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import ssl
import time
import urllib.parse
from collections.abc import Mapping

from psft.errors import RequestError, first_line, shown

RETRIED_STATUS = frozenset({408, 409, 425, 429})
FATAL_STATUS = frozenset({401, 403, 404, 405})
_LONGEST_BODY = 64 << 20  # bytes: no answer is that long; a broken server must not fill the memory


class TryAgain(Exception):
    """Raised for what may go better next time. after_s: what the server asked to wait."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Refused(Exception):
    """Raised for a request the server will never answer. is_fatal: nor any other."""

    def __init__(self, reason: str, *, is_fatal: bool) -> None:
        super().__init__(reason)
        self.is_fatal = is_fatal


def check_url(base_url: str) -> None:
    """Raises RequestError for what is no http(s) URL with a host."""
    try:
        parts = urllib.parse.urlsplit(base_url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        is_url = False
    if not is_url:
        raise RequestError(f"--base_url {shown(base_url)} is no URL. Give e.g. http://localhost:8000/v1.")


class Connection:
    """To `base_url`/chat/completions; opened when needed, anew after anything odd. timeout_s: for a whole request."""

    def __init__(self, base_url: str, api_key: str | None, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(base_url)
        self.host, self.port, self.is_tls = str(parts.hostname), parts.port, parts.scheme == "https"
        self.path = parts.path.rstrip("/") + "/chat/completions"
        self.timeout_s = timeout_s
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self._http: http.client.HTTPConnection | None = None

    def drop(self) -> None:
        """Close it; the next `post` opens another."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def post(self, body: bytes) -> bytes:
        """The body of a 200 answer.

        Raises:
            TryAgain: the server is busy, slow, gone, or broke off.
            Refused: it says no.
        """
        deadline = time.monotonic() + self.timeout_s
        try:
            if self._http is None:
                self._http = self._open()
            self._http.request("POST", self.path, body, self.headers)
            sock = self._http.sock  # kept: after `Connection: close` only the answer still reads from it
            response = self._http.getresponse()
            content = self._read(response, sock, deadline)
        except TimeoutError as error:
            raise TryAgain(f"no answer within {self.timeout_s:g} s") from error
        except http.client.IncompleteRead as error:
            raise TryAgain("the answer broke off") from error
        except (http.client.HTTPException, OSError, ValueError) as error:  # ValueError: a chunk without its length
            raise TryAgain(f"connection lost ({type(error).__name__}: {shown(first_line(error), 80)})") from error
        if response.status == 200:
            return content
        reason = f"answers {response.status}: {shown(_message(content), 160)}"
        if response.status in RETRIED_STATUS or response.status >= 500:
            raise TryAgain(reason, retry_after_s(response.headers.get("Retry-After")))
        raise Refused(reason, is_fatal=response.status in FATAL_STATUS)

    def _open(self) -> http.client.HTTPConnection:
        if self.is_tls:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.host, self.port, timeout=self.timeout_s, context=context)
        return http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)

    def _read(self, response: http.client.HTTPResponse, sock: object, deadline: float) -> bytes:
        parts: list[bytes] = []
        size = 0
        set_timeout = getattr(sock, "settimeout", lambda seconds: None)
        while True:
            rest_s = deadline - time.monotonic()
            if rest_s <= 0:
                raise TimeoutError
            set_timeout(rest_s)
            part = response.read1(1 << 16)
            if not part:
                if response.length:  # fewer bytes than Content-Length says
                    raise http.client.IncompleteRead(b"".join(parts), response.length)
                response.close()  # read1 leaves it open at its end, and the connection takes no request until it is
                set_timeout(self.timeout_s)
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > _LONGEST_BODY:
                raise http.client.HTTPException("the answer has no end")


def _message(content: bytes) -> str:
    """The server's own words about an error."""
    try:
        body = json.loads(content)
        error = body.get("error", body)
        return str(error.get("message", error) if isinstance(error, Mapping) else error)
    except (ValueError, AttributeError):
        return content[:200].decode("latin1")


def retry_after_s(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: it holds a number, or a date. None: neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
