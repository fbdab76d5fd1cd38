"""Laws of `in_order`: what it gives is what `map` gives, faults included, from processes that end with this one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest

import psft
from psft.data import encode
from psft.data.encode import RowEncoder
from psft.data.formats import FORMATS
from psft.data.workers import in_order
from psft.errors import RequestError, RunFailed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="elsewhere everything is done in one process")


def test_results_come_in_the_order_of_the_items_from_several_processes():
    """Goes red if results are taken as they finish, or everything runs in one process."""
    found = list(in_order(jobs.square_and_process, range(20), 3))
    assert [square for square, _ in found] == [item * item for item in range(20)]
    assert len({process for _, process in found} - {os.getpid()}) > 1
    assert {process for _, process in in_order(jobs.square_and_process, range(4), 1)} == {os.getpid()}


@pytest.mark.parametrize("num_processes", [1, 3])
def test_an_error_comes_up_in_its_items_turn(num_processes):
    """Goes red if the first error to happen wins, or results before it are lost."""
    found = []
    with pytest.raises(RequestError, match="row 4"):
        for result in in_order(jobs.refuse_four_and_six, range(9), num_processes):
            found.append(result)
    assert found == [0, 1, 2, 3]


def test_an_error_that_cannot_be_sent_is_told_in_its_words():
    """Goes red if it ends the process, or comes out as the pickle's own complaint."""
    with pytest.raises(RuntimeError, match="^OddError: item 0$"):
        list(in_order(jobs.raise_odd_error, range(3), 2))


@pytest.mark.parametrize("num_processes", [1, 3])
def test_an_error_of_the_source_waits_for_the_items_before_it(num_processes):
    """Goes red if reading ahead lets a damaged end of a file hide an error in its beginning."""

    def items() -> Iterator[int]:
        yield from range(3)
        raise RequestError("the file ends too soon")

    found = []
    with pytest.raises(RequestError, match="ends too soon"):
        for result in in_order(abs, items(), num_processes):
            found.append(result)
    assert found == [0, 1, 2]


def test_only_a_few_items_are_read_ahead():
    """Goes red if all items are given out at once: the memory would hold the whole source."""
    read = []

    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    results = in_order(abs, items(), 2)
    assert next(results) == 0 and len(read) <= 6
    results.close()
    assert len(read) <= 6


def test_an_item_that_cannot_be_sent_is_worked_on_here():
    """Rows of a data set may hold any object. Goes red if such an item is an error, or changes the order."""
    assert list(in_order(jobs.called_or_itself, [1, lambda: 2, 3], 2)) == [1, 2, 3]


def test_a_process_that_dies_is_told_in_words():
    """Goes red if the end of the socket comes out as it is, or nothing ever does."""
    with pytest.raises(RunFailed, match="died .SIGKILL: of too little memory.*--dataset_num_proc"):
        list(in_order(jobs.die_over_three, range(8), 2))


def test_the_processes_end_with_a_parent_that_is_killed(tmp_path: Path):
    """The script has no guard around what it does. Goes red if a worker runs it again, or if nothing tells the workers:
    they would stay for ever, and so would what they hold."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import jobs
            from psft.data.workers import in_order
            print("started", flush=True)
            list(in_order(jobs.square_and_process, range(1000), 2))
        """)
    )
    path = os.pathsep.join([str(Path(psft.__file__).parents[1]), str(Path(jobs.__file__).parent)])
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert parent.stdout is not None and parent.stdout.readline() == "started\n"
    children: list[int] = []
    end = time.monotonic() + 60
    while time.monotonic() < end and len(children) < 2:
        children = children_of(parent.pid)
        time.sleep(0.02)
    assert len(children) == 2
    parent.kill()
    parent.wait()
    while time.monotonic() < end and any(is_running(child) for child in children):
        time.sleep(0.05)
    assert not any(is_running(child) for child in children)
    assert parent.stdout.read() == ""


def children_of(process: int) -> list[int]:
    threads = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ending_early_does_not_wait_for_work_that_was_given_out():
    """Goes red if closing waits for a minute's work in the processes."""

    def items() -> Iterator[float]:
        yield 0.0
        yield from (60.0 for _ in range(9))

    start = time.monotonic()
    results = in_order(time.sleep, items(), 2)
    next(results)
    results.close()
    assert time.monotonic() - start < 50


def encoder_of(tokenizer):
    format = next(format for format in FORMATS if format.name == "question-answer")
    return RowEncoder(tokenizer, format, columns=None, system_prompt=None, max_length=64)


def test_a_process_that_encodes_starts_without_torch(tiny_tokenizer):
    """torch takes longer to import than all the rest. Goes red if the way to an encoder imports it."""
    (modules,) = in_order(jobs.Modules(encoder_of(tiny_tokenizer)), [0], 2)
    assert "transformers" in modules and modules & {"torch", "trl", "datasets", "pandas"} == set()


def test_an_encoder_is_refused_where_its_tokenizer_arrives_as_another(tiny_tokenizer, monkeypatch):
    """Goes red if nobody looks: other versions or a part written in Python could give other tokens in silence."""
    sent = pickle.dumps(encoder_of(tiny_tokenizer))
    assert pickle.loads(sent).end_token == "<|im_end|>"
    monkeypatch.setattr(encode, "digest_of_tokenizer", lambda tokenizer: "another")
    with pytest.raises(RunFailed, match="does not arrive whole.*--dataset_num_proc 1"):
        pickle.loads(sent)
