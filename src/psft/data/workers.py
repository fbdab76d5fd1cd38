"""A function over many items in several processes, its results in the order of the items.

Each process is a fresh interpreter (`worker`). A thread of this process stands for each, hands it an item and waits for
the result, so neither side ever waits for room in a pipe that the other does not empty.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from psft.errors import RunFailed
from psft.processes import start_interpreter

Item = TypeVar("Item")
Result = TypeVar("Result")

_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # the processes themselves fill the cores
_AHEAD = 2  # items given out for each process beyond the one it works on, so that none waits for the reader


def in_order(function: Callable[[Item], Result], items: Iterable[Item], num_processes: int) -> Iterator[Result]:
    """`function` of each item, in the order of `items`.

    An exception of the function comes up in its item's turn. Only a few items are read ahead of the results, so neither
    fills the memory. The processes end with this one, whatever ends it, and leave Ctrl-C to it.

    Args:
        function: can be pickled, unless there is one process. What it changes in itself stays in its process.
        num_processes: 1 = in this process. Elsewhere than on POSIX systems always this one.
    Raises:
        RunFailed: a process died, or could not be started.
    """
    if num_processes == 1 or os.name != "posix":
        yield from map(function, items)
        return
    pool = _Pool(pickle.dumps(function, protocol=pickle.HIGHEST_PROTOCOL), num_processes)
    waiting: deque[Future[Result]] = deque()
    fault: Exception | None = None
    source = iter(items)
    try:
        while True:
            try:
                item = next(source)
            except StopIteration:
                break
            except Exception as error:  # its turn comes after the results of the items before it
                fault = error
                break
            waiting.append(_given_out(pool, function, item))
            if len(waiting) > num_processes * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.end()
    if fault is not None:
        raise fault


def _given_out(pool: _Pool, function: Callable[[Item], Result], item: Item) -> Future[Result]:
    """The result to come; computed here and now where the item cannot be sent: a data set may hold any object."""
    try:
        message = pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception:  # what an object's own code raises has no common type
        here: Future[Result] = Future()
        try:
            here.set_result(function(item))
        except Exception as error:
            here.set_exception(error)
        return here
    return pool.submit(message)


class _Pool:
    """Threads, each with a process of its own that is started when the thread gets its first item."""

    def __init__(self, function: bytes, num_processes: int) -> None:
        self._function = function
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="psft-data")
        self._own = threading.local()
        self._lock = threading.Lock()
        self._processes: list[_Process] = []
        self._is_over = False

    def submit(self, message: bytes) -> Future[Any]:
        return self._threads.submit(self._call, message)

    def end(self) -> None:
        """End every process, busy or not, and wait for the threads."""
        with self._lock:
            self._is_over = True
            for process in self._processes:
                process.end()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.close()

    def _call(self, message: bytes) -> Any:
        if not hasattr(self._own, "process"):
            with self._lock:
                if self._is_over:
                    raise RunFailed("the processes that prepare the data have been ended.")
                self._own.process = _Process()
                self._processes.append(self._own.process)
            self._own.process.ask(self._function)
        return self._own.process.ask(message)


class _Process:
    """A fresh interpreter and this end of the socket to it."""

    def __init__(self) -> None:
        try:
            self._process, self._connection = start_interpreter("psft.data.worker", _ONE_THREAD)
        except OSError as error:
            raise RunFailed(
                f"a process that prepares the data cannot be started: {error.strerror or error}. Let this one do it: "
                "--dataset_num_proc 1."
            ) from error

    def ask(self, message: bytes) -> Any:
        """What the process makes of the message. Raises what it raises; RunFailed: it is gone."""
        try:
            self._connection.send_bytes(message)
            is_well, answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise RunFailed(
                f"a process that prepares the data died ({self._how_it_ended()}). Use fewer: --dataset_num_proc 1."
            ) from error
        if not is_well:
            raise answer
        return answer

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "it hung up, but did not end"
        if code == -signal.SIGKILL:
            return "SIGKILL: of too little memory as a rule"
        named = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
        return f"{named}; see its message above, if there is one"

    def end(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._connection.close()
        self._process.wait()
