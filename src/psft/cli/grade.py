"""`psft grade`: a file of responses in, the same rows with score, extracted answer and reason out. Loads no torch."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from psft.errors import RequestError, shown

HELP = "Grade answers from anywhere: mathematics, multiple choice, instruction following."
_MOST_SHOWN = 10

_ABOUT = """Rows of IN.jsonl come back in OUT.jsonl in the same order, all their fields kept, with

  score      0 or 1
  extracted  the answer found in the response; null if none was found, which is counted and never guessed
  reason     in a few words
  details    what else the grader knows, e.g. both policies of mathematics

Fields a row needs:
  math       response, gold: text, a number, or a list of which any is right
  choice     response, gold: a letter; options (list of texts) if they are known
  ifeval     response, prompt, instruction_id_list, kwargs

OUT.jsonl appears when every row has been graded; a file of that name is replaced then, not before."""


@dataclass(frozen=True)
class Request:
    """What was asked for. settings: of the grader. num_workers: None = one a processor. time_limit: seconds a row."""

    source: Path
    out: Path
    grader: str
    settings: dict[str, Any]
    num_workers: int | None
    time_limit: float


@dataclass
class Tally:
    """What was graded so far."""

    num_rows: int = 0
    score: float = 0.0
    without_answer: int = 0
    timed_out: int = 0
    differ: Counter[str] = field(default_factory=Counter)

    def add(self, grade: Any) -> None:
        """Count one `psft.rewards.Grade`."""
        self.num_rows += 1
        self.score += grade.score
        self.without_answer += grade.extracted is None and not grade.is_timed_out
        self.timed_out += grade.is_timed_out
        for one, other in (("strict", "psft"), ("strict", "loose")):
            values = grade.details.get(one), grade.details.get(other)
            if None not in values and values[0] != values[1]:
                self.differ[f"{one} and {other}"] += 1

    def lines(self, request: Request) -> list[str]:
        """The summary, for people."""
        of = max(self.num_rows, 1)
        how = {"math": request.settings.get("policy")}.get(request.grader)
        named = request.grader if how is None else f"{request.grader}, {how}"
        lines = [
            f"graded {self.num_rows} answers ({named}): mean score {self.score / of:.4f}",
            f"no answer found: {self.without_answer} ({self.without_answer / of:.1%}); timed out: {self.timed_out}",
        ]
        lines += [f"{names} differ on {count}" for names, count in self.differ.items()]
        return [*lines, f"written: {request.out}"]


def run(argv: list[str]) -> int:
    """Grades the file and prints a summary. Returns the exit code.

    Raises:
        RequestError: an unknown grader or option, a file that cannot be read or written, rows without what is needed.
    """
    request = parse(argv)
    if request is None:
        return 0
    tally = grade_file(request)
    print("\n".join(tally.lines(request)))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"psft grade: {message}. See psft grade --help.")


def parse(argv: list[str]) -> Request | None:
    """The request; None if it was for help, which is printed.

    Raises:
        RequestError: an unknown or contradictory option.
    """
    from psft.rewards import get_grader, grader_names

    parser = _Parser(
        prog="psft grade", description=HELP, epilog=_ABOUT, add_help=False, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("source", metavar="IN.jsonl")
    add("--out", metavar="OUT.jsonl", required=True)
    add("--grader", required=True, metavar="NAME", help=", ".join(grader_names()) + "; or module:Class, your own")
    add("--policy", help="math: strict (default; the last box) or psft (as the paper's script grades)")
    add("--require_boxed", choices=("true", "false"), help="math, strict: only a box is an answer; default true")
    add("--relative_tolerance", type=float, help="math, strict: between numbers; default 0")
    add("--level", choices=("loose", "strict"), help="ifeval: default loose, which the paper reports")
    add(
        "--nltk_data",
        metavar="DIR",
        help="ifeval: folder with tokenizers/punkt_tab; default: nltk_data beside IN.jsonl",
    )
    add("--num_workers", type=int, help="processes; default: one a processor")
    add("--time_limit", type=float, default=5.0, help="processor seconds a row may take; default 5")
    if {"-h", "--help"} & set(argv):
        print(parser.format_help(), end="")
        return None
    options = parser.parse_args(argv)
    source, out = Path(options.source), Path(options.out)
    settings = _settings(options, source)
    get_grader(options.grader, **settings)  # raises: unknown, or a setting it does not take
    return Request(source, out, options.grader, settings, options.num_workers, options.time_limit)


def _settings(options: argparse.Namespace, source: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if options.policy is not None:
        settings["policy"] = options.policy
    elif options.grader == "math":
        settings["policy"] = "strict"
    if options.require_boxed is not None:
        settings["require_boxed"] = options.require_boxed == "true"
    if options.relative_tolerance is not None:
        settings["relative_tolerance"] = options.relative_tolerance
    if options.level is not None:
        settings["is_loose"] = options.level == "loose"
    beside = source.parent / "nltk_data"
    if options.nltk_data is not None:
        settings["nltk_data"] = options.nltk_data
    elif options.grader == "ifeval" and beside.is_dir():
        settings["nltk_data"] = str(beside)
    return settings


def grade_file(request: Request) -> Tally:
    """Check every row, then grade them and write the file.

    Raises:
        RequestError: a file cannot be read or written, or rows cannot be graded (the first ten by file:line).
    """
    from tqdm import tqdm

    from psft.rewards import get_grader, grade_rows

    grader = get_grader(request.grader, **request.settings)
    if request.out.exists() and request.source.exists() and request.out.samefile(request.source):
        raise RequestError(f"{request.out} is also what is read. Give --out another name.")
    num_rows = _check(request.source, grader)
    tally = Tally()
    part = request.out.with_name(f".{request.out.name}.{os.getpid()}.part")
    try:
        grades = grade_rows(
            request.grader,
            (row for _, row in _rows(request.source)),
            num_workers=request.num_workers,
            time_limit=request.time_limit,
            **request.settings,
        )
        with open(part, "w", encoding="utf-8") as file:
            pairs = zip(_rows(request.source), grades, strict=True)
            for (_, row), grade in tqdm(pairs, total=num_rows, unit="answer", disable=None):
                tally.add(grade)
                given = {"score": grade.score, "extracted": grade.extracted, "reason": grade.reason}
                details = {"details": dict(grade.details)} if grade.details else {}
                file.write(json.dumps({**row, **given, **details}, ensure_ascii=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(request.out)
    except OSError as error:
        raise RequestError(
            f"{request.out} cannot be written: {error.strerror or error}. Choose another --out."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return tally


def _check(source: Path, grader: Any) -> int:
    """The number of rows, all of which can be graded."""
    problems: list[str] = []
    number = 0
    for line, row in _rows(source):
        number += 1
        try:
            grader.check(row)
        except RequestError as error:
            problems.append(f"{source}:{line}: {error}")
    if problems:
        more = len(problems) - _MOST_SHOWN
        lines = problems[:_MOST_SHOWN] + ([f"... and {more} more"] if more > 0 else [])
        raise RequestError("rows cannot be graded; nothing was written.\n  " + "\n  ".join(lines))
    if not number:
        raise RequestError(f"{source} has no rows. Give one JSON object a line.")
    return number


def _rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number from 1, and the row; empty lines are left out."""
    try:
        with open(source, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _row(source, number, line)
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error.strerror or error}.") from error


def _row(source: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except ValueError as error:
        what = shown(str(error), 100)
        raise RequestError(
            f"{source}:{number}: this is no line of JSON ({what}). Give one JSON object a line."
        ) from error
    if not isinstance(row, dict):
        raise RequestError(f"{source}:{number}: a JSON {type(row).__name__}, not an object with fields.")
    return row
