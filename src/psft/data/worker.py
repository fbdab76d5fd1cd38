"""A process that works for `psft.data.workers`, which starts an interpreter that calls `serve`.

It has one thread, the main one, as the limits of chat templates need it, and imports what the function needs: for a
tokenizer transformers, but not torch. It ends when the parent hangs up, whatever ended the parent.
"""

from __future__ import annotations

import pickle
import signal
from multiprocessing.connection import Connection
from typing import Any


def serve(descriptor: int) -> None:
    """All that this process does. descriptor: of its end of the socket.

    Messages, pickled. In: the function, then an item each. Out, in the same order, for the function too:
    (True, result) or (False, the exception).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends its workers
    connection = Connection(descriptor)
    function: Any = None
    answer: tuple[bool, Any]
    try:
        while True:
            message = connection.recv_bytes()
            try:
                value = pickle.loads(message)
                if function is None:
                    function, answer = value, (True, None)
                else:
                    answer = (True, function(value))
            except Exception as error:
                answer = (False, _can_be_sent(error))
            connection.send_bytes(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))
    except (EOFError, ConnectionError):
        pass  # the parent has what it wanted, or is gone


def _can_be_sent(error: Exception) -> Exception:
    """The exception, or one that says the same where it takes arguments of its own."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # what an object's own code raises has no common type
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
