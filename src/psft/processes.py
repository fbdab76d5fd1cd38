"""Fresh interpreters that work for this process, each at the other end of a socket.

Never a fork: this process may hold threads of torch or tokenizers, whose locks a fork would copy as they are at that
moment, a GPU, which no fork can use, or a `__main__` without a guard, which multiprocessing would run again. POSIX
only.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection


def start_interpreter(
    module: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process that calls `serve` of a module with the descriptor of its end, and this end.

    It finds modules as this process does, reads nothing from stdin and writes nothing to stdout.

    Args:
        environment: variables beside this process's own.
    Raises:
        OSError: no process can be started.
    """
    own = {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONSAFEPATH": "1",  # `-c` alone would look into the folder one is in before all others
    }
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", f"from {module} import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **own, **(environment or {})},
            )
        except OSError:
            ours.close()
            raise
    return process, Connection(ours.detach())
