"""One stage in a process of its own: what it prints goes into its log, signals go to it, the folder is locked for both.

The process of a stage outlives nobody: where `psft run` is killed, it saves and ends (`psft.cli.attend`), and until
then it holds the lock that it was handed, so that a second `psft run` waits instead of writing into the same run.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from psft.errors import RequestError

LOG = "stage.log"
END = "stage.json"
"""In a stage's folder: how its last attempt ended, written by its own process."""
_LOCK = "pipeline.lock"
_EVERY_S = 0.1


class FolderLock:
    """Held by one `psft run` and the stage it has started, over a pipeline's folder.

    Raises:
        RequestError: another `psft run` is at work there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / _LOCK
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)

    def __enter__(self) -> FolderLock:
        is_said = False
        while True:
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = self._owner()
                if owner is not None:
                    os.close(self.handle)
                    raise RequestError(
                        f"another psft run (process {owner}) is at work in {self.path.parent}. Wait for it, or stop "
                        f"it: kill -INT {owner}."
                    ) from None
                if not is_said:
                    print(
                        "psft run: the stage of a psft run that was killed is still saving; waiting for it to end.",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                    is_said = True
                time.sleep(0.5)
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def _owner(self) -> int | None:
        """The process that took the lock, if it is alive; None where only a stage of it holds the lock yet."""
        text = os.pread(self.handle, 32, 0).split()
        number = int(text[0]) if text and text[0].isdigit() else 0
        try:
            os.kill(number, 0) if number else None
        except OSError:
            return None
        return number or None


class Signals:
    """Ctrl-C and SIGTERM on their way to the stage that runs; between stages they end the pipeline. number: the first
    that came, or None."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def handed_on(self) -> Iterator[None]:
        """Inside, signals are handled here. Does nothing in another thread than the first."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._received) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.process.send_signal(number)


def run_stage(
    program: Sequence[str], arguments: Sequence[str], folder: Path, key: str, lock: FolderLock, signals: Signals
) -> int:
    """Run a stage to its end and show what it prints. Returns its exit code; negative: the signal that killed it.

    Args:
        program: what attends the stage; is given FOLDER KEY PARENT -- arguments.
        arguments: the stage's command line after `psft`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / END).unlink(missing_ok=True)
    log = folder / LOG
    with open(log, "ab") as output:
        output.write(f"\n$ psft {shlex.join(arguments)}\n".encode())
        output.flush()
        seen = output.tell()
        process = subprocess.Popen(
            [*program, str(folder), key, str(os.getpid()), "--", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C comes to us alone, and goes on from here once
            pass_fds=[lock.handle],
            env=environment(),
        )
    signals.process = process
    if signals.number is not None:  # it came while the process was started
        process.send_signal(signals.number)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        with open(log, "rb") as shown:
            shown.seek(seen)
            while True:
                is_over = process.poll() is not None
                text = decoder.decode(shown.read(), is_over)
                if text:
                    sys.stdout.write(text)
                    sys.stdout.flush()
                if is_over:
                    return int(process.returncode)
                time.sleep(_EVERY_S)
    finally:
        signals.process = None
        if process.poll() is None:  # whatever went wrong here: the stage saves and ends
            process.terminate()


def environment() -> Mapping[str, str]:
    """This process's, for a Python that finds modules as this one does."""
    path = os.pathsep.join(item or os.getcwd() for item in sys.path)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def last_lines(log: Path, number: int = 15) -> list[str]:
    """The end of a log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").splitlines()]
    return [line for line in lines if line][-number:]
