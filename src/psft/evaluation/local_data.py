"""Where the files of benchmarks lie; those that are not there are named together, with the way to get them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from psft.errors import RequestError
from psft.evaluation.benchmarks import Benchmark, Suite
from psft.evaluation.items import Data, find_file, load_data, why_absent


def data_folder(named: str | None, *, setting: str) -> Path | None:
    """The folder with the benchmark files, named by a setting or by PSFT_DATA_DIR; None if by neither.

    Args:
        setting: how the message writes it, up to the value: `--data_dir `.
    Raises:
        RequestError: it is no folder.
    """
    named = named or os.environ.get("PSFT_DATA_DIR")
    folder = Path(named).expanduser() if named else None
    if folder is not None and not folder.is_dir():
        raise RequestError(f"{setting}{folder} is no folder. Give the one that holds the benchmark files.")
    return folder


def not_here(suite: Suite, data_dir: Path | None) -> list[Benchmark]:
    """The benchmarks whose data are not on this machine; items that are made always are."""
    return [b for b in suite.benchmarks if not b.is_made and find_file(b, data_dir) is None]


def leave_out(
    absent: Sequence[str],
    num_asked: int,
    *,
    skip_missing: bool | None,
    say: Callable[[str], None],
    title: str = "not here",
) -> None:
    """Say which sets are left out, or refuse.

    Args:
        absent: of each set that is not there why, and how to get it. num_asked: sets asked for.
        skip_missing: go on without, as long as one is there; None: nobody can ask for that. title: of the refusal.
    Raises:
        RequestError: a set is absent, and nothing says to go on without.
    """
    is_none_left = len(absent) == num_asked
    if absent and (not skip_missing or is_none_left):
        advice = "" if is_none_left or skip_missing is None else "\nAdd --skip_missing to go on without."
        raise RequestError(f"{title}:\n" + "\n".join(f"  - {line}" for line in absent) + advice)
    for line in absent:
        say(f"left out: {line}")


def load_all(
    suite: Suite,
    data_dir: Path | None,
    *,
    download: bool,
    any_rows: bool = False,
    skip_missing: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    prefix: str = "--",
    title: str = "not here",
) -> list[Data]:
    """The data of every benchmark of a suite.

    Args:
        download: fetch from the hub what is not here. any_rows: take files of another number of rows than expected.
        skip_missing, say, title: see `leave_out`. prefix: of the options data_dir and download.
    Raises:
        RequestError: data are absent and not skipped, or not as they should be.
    """
    missing = not_here(suite, data_dir)
    absent = [benchmark for benchmark in missing if not (download and benchmark.hub is not None)]
    words = [why_absent(benchmark, data_dir, prefix=prefix) for benchmark in absent]
    leave_out(words, len(suite.benchmarks), skip_missing=skip_missing, say=say, title=title)
    for benchmark in missing:
        if benchmark not in absent:
            say(f"fetching {benchmark.shown_name} from the hub: {benchmark.hub.id if benchmark.hub else ''}")
    return [
        load_data(benchmark, data_dir, download=download, any_rows=any_rows)
        for benchmark in suite.benchmarks
        if benchmark not in absent
    ]
