"""`psft report`: figures, tables and a one-file page from run folders, once or while a run goes on. Loads no torch."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from psft.errors import RequestError

HELP = "One-file HTML, PNG and PDF figures and CSV tables from run folders."
EVERY_S = 10.0
"""Seconds between two readings with --watch, unless --every says another number."""

_USAGE = f"""usage: psft report RUN... [--base RESULTS]... [--out DIR] [--watch] [--every SECONDS]

Reads the folders of runs (finished, going on, crashed) and writes DIR/index.html, a page that opens from disk, with
tables/*.csv at full resolution and, where matplotlib is installed, figures/*.png and *.pdf.

  RUN              output_dir of a run, or a folder that holds several; runs that differ in seed alone become one line
  --base RESULTS   what psft eval wrote for the model before training (MODEL.SUITE.json, or its folder), for the score
                   tables to compare with, item by item; may be given several times. Without it: step 0 of the runs
  --out DIR        default: RUN/report for one run, ./report for several
  --watch          write the page again while a run goes on; ends when all have ended, or on Ctrl-C
  --every SECONDS  how often, with --watch; default {EVERY_S:g}

docs/report.md says what each figure shows and how to read it."""

_EXAMPLES = {"--out": "report", "--every": "10", "--base": "evals/MODEL"}
"""Options with a value."""


@dataclass(frozen=True)
class Request:
    """What was asked for. every_s: None = once."""

    runs: list[str]
    out: Path | None
    every_s: float | None
    bases: tuple[str, ...] = ()


def run(argv: list[str]) -> int:
    """Writes the report and prints where it is. Returns the exit code.

    Raises:
        RequestError: no such folder, no run in it, an unknown option, or a folder that cannot be written.
    """
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        print(_USAGE)
        return 0
    request = parse(argv)
    return _once(request) if request.every_s is None else _watch(request, request.every_s)


def parse(argv: list[str]) -> Request:
    """The request in words' order; options may stand anywhere.

    Raises:
        RequestError: an unknown option, one without its value, or no run.
    """
    runs: list[str] = []
    values: dict[str, str] = {}
    bases: list[str] = []
    is_watching = False
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--watch":
            is_watching = True
        elif name in _EXAMPLES:
            if not equals and (not rest or rest[0].startswith("--")):
                raise RequestError(f"{name} needs a value, e.g. {name} {_EXAMPLES[name]}.")
            values[name] = value if equals else rest.pop(0)
            bases += [values[name]] if name == "--base" else []
        elif word.startswith("-"):
            raise RequestError(f"unknown option {word}. Known: --base RESULTS, --out DIR, --watch, --every SECONDS.")
        else:
            runs.append(word)
    if not runs:
        raise RequestError(
            "no run was named. Give the output_dir of one or more runs, e.g. psft report runs/quickstart."
        )
    if "--every" in values and not is_watching:
        raise RequestError("--every has no effect without --watch. Add --watch, or remove it.")
    out = Path(values["--out"]) if "--out" in values else None
    return Request(runs, out, _seconds(values.get("--every")) if is_watching else None, tuple(bases))


def _seconds(text: str | None) -> float:
    if text is None:
        return EVERY_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 86400:
        raise RequestError(f"--every {text} must be a number of seconds, 1 or more.")
    return seconds


def _once(request: Request) -> int:
    from psft.reports import find_runs

    paths = find_runs(request.runs)
    written = _report(paths, _folder(request, paths), None, request.bases)
    print(written.page)
    return 0


def _watch(request: Request, every_s: float) -> int:
    """Write again and again, until all runs have ended or Ctrl-C; a folder without a run yet is waited for."""
    from psft.reports import find_runs

    is_announced = False
    try:
        while True:
            try:
                paths = find_runs(request.runs)
            except RequestError as error:
                if not is_announced:
                    print(f"waiting: {error}", file=sys.stderr, flush=True)
                    is_announced = True
                time.sleep(every_s)
                continue
            out = _folder(request, paths)
            written = _report(paths, out, every_s, request.bases)
            if written.is_over:
                print(f"{written.page}: complete, every run has ended.")
                return 0
            steps = ", ".join(f"{r.label} at step {r.num_steps:,}" for r in written.runs if not r.is_over)
            print(f"{written.page}: {steps}", flush=True)
            time.sleep(every_s)
    except KeyboardInterrupt:
        print("stopped watching; the page stays as it was last written.", file=sys.stderr)
        return 0


def _report(paths: list[Path], out: Path, refresh_s: float | None, bases: tuple[str, ...]):  # type: ignore[no-untyped-def]  # Written, lazily
    from psft.cli.main import COMMANDS
    from psft.reports import write_report
    from psft.reports.plot import HOW_TO_INSTALL, has_matplotlib

    written = write_report(paths, out, commands=set(COMMANDS), refresh_s=refresh_s, bases=bases)
    if written.is_over or refresh_s is None:
        if not has_matplotlib():
            print(
                f"no PNG and PDF figures: they need matplotlib ({HOW_TO_INSTALL}). The page is whole.", file=sys.stderr
            )
    return written


def _folder(request: Request, paths: list[Path]) -> Path:
    if request.out is not None:
        return request.out
    return paths[0] / "report" if len(paths) == 1 else Path("report")
