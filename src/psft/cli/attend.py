"""The process of one stage of a pipeline: `python -m psft.cli.attend FOLDER KEY PARENT -- COMMAND ...`.

It runs the command as `psft COMMAND ...` does, writes down how it ended, and watches the `psft run` that started it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from psft.pipelines.process import END
from psft.pipelines.state import now
from psft.runs import RunFolder

_EVERY_S = 1.0


def attend(folder: Path, key: str, parent: int, body: Callable[[], int]) -> int:
    """Run `body` and write its exit code to FOLDER/stage.json, so that a result is known even if nobody waits for it.

    Args:
        key: of the stage, kept beside the code. parent: the process whose end makes this one save and end, too.
    """
    _follow(parent)
    code = body()
    RunFolder(folder).write_json(END, {"key": key, "exit_code": code, "ended_at": now()})
    return code


def _follow(parent: int) -> None:
    """Send this process SIGTERM, once, when `parent` is gone: a command that trains then saves and ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY_S)
        os.write(2, b"\npsft: the psft run that started this stage is gone, so the stage saves and ends.\n")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def run(argv: list[str]) -> int:
    """FOLDER KEY PARENT -- COMMAND ..."""
    from psft.cli.main import main

    folder, key, parent, _, *arguments = argv
    return attend(Path(folder), key, int(parent), lambda: main(arguments))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
