"""From run folders to a folder with index.html, tables/ and figures/."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psft.errors import RequestError
from psft.reports.advice import next_run
from psft.reports.charts import Figure
from psft.reports.evaluations import Evaluation, read_bases
from psft.reports.figures import Inputs, make_figures
from psft.reports.groups import make_groups
from psft.reports.load import Run, Sink, labels, load_run
from psft.reports.page import Content, render
from psft.reports.plot import has_matplotlib, save_figures
from psft.reports.score_tables import make_tables
from psft.reports.tables import TableWriter
from psft.reports.verdict import Finding, findings
from psft.runs import RunFolder
from psft.runs.folder import replace_file

PAGE = "index.html"
_MANIFEST = ".files.json"
"""In the report's folder: which tables and images the last report wrote, so that the next removes what it has not."""


@dataclass(frozen=True)
class Written:
    """page: the HTML file. images: PNG and PDF files, empty without matplotlib. runs: what was read."""

    page: Path
    images: list[Path] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether every run has said how it ended."""
        return all(run.is_over for run in self.runs)


def write_report(
    paths: list[Path],
    out: Path,
    *,
    commands: Collection[str] = (),
    refresh_s: float | None = None,
    images: bool | None = None,
    bases: Sequence[str] = (),
) -> Written:
    """Read the runs and write their report.

    Args:
        paths: run folders, see `psft.reports.load.find_runs`.
        commands: names of the psft commands there are, so that the page names none that is missing.
        refresh_s: the page says that it is live and reads itself again so often, as long as a run has not ended; tables
            and image files are left for the last time, when all have. None = once and for all.
        bases: results files of `psft eval`, or folders of them, for the models before training.
        images: whether to make PNG and PDF files, which take longest; None = if matplotlib is there.
    Raises:
        RequestError: `out` cannot be written, or a file of `bases` cannot be used.
    """
    of_bases = read_bases(list(bases))
    _make(out)
    names = labels(paths)
    if refresh_s is not None:
        runs = _load(paths, names, None)
        if not all(run.is_over for run in runs):
            return _write(runs, of_bases, out, commands, refresh_s=refresh_s, save_images=None, save_tables=None)
    writer = TableWriter(out / "tables", names)
    runs = _load(paths, names, writer.take)
    wants_images = has_matplotlib() if images is None else images
    save_images = save_figures if wants_images else None
    return _write(runs, of_bases, out, commands, refresh_s=None, save_images=save_images, save_tables=writer)


def _load(paths: list[Path], names: list[str], sink: Sink | None) -> list[Run]:
    """The runs in order, two at a time: reading and writing of tables leave Python to the other."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda path, name: load_run(RunFolder(path), name, sink=sink), paths, names))


def _write(
    runs: list[Run],
    bases: list[Evaluation],
    out: Path,
    commands: Collection[str],
    *,
    refresh_s: float | None,
    save_images: Callable[[list[Figure], Path], list[Path]] | None,
    save_tables: TableWriter | None,
) -> Written:
    groups = make_groups(runs)
    found = {run.label: findings(run) for run in runs}
    inputs = Inputs(groups, commands)
    sections, score_tables = make_figures(inputs), make_tables(inputs, bases)
    figures = [figure for section in sections.values() for figure in section]
    content = Content(
        groups=groups,
        sections=sections,
        score_tables=score_tables,
        findings=found,
        advice={run.label: next_run(run, found[run.label], runs) for run in runs},
        written_at=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        refresh_s=refresh_s,
        has_images=save_images is not None,
    )
    if save_tables is not None:
        save_tables.write(runs, figures, score_tables, [_summary(run, found[run.label]) for run in runs])
    images = save_images(figures, out / "figures") if save_images is not None else []
    replace_file(out / PAGE, _encoded(render(content)))
    if save_tables is not None:
        _remove_stale(out, [*save_tables.written, *images])
    return Written(out / PAGE, images, runs)


def _summary(run: Run, found: dict[str, Finding]) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.label, "path": run.path, "exit_reason": run.exit_reason, "steps": run.num_steps}
    row |= {"objective": run.objective.get("name"), "seed": run.info.get("seed")}
    for name, finding in found.items():
        row[name] = finding.answer
        row |= {f"{name}_{key}": value for key, value in finding.values.items()}
    return row | {"alerts": " ".join(alert.name for alert in run.alerts)}


def _remove_stale(out: Path, written: list[Path]) -> None:
    """Delete tables and images of the report before this one that this one did not write again."""
    now = {path.relative_to(out).as_posix() for path in written}
    try:
        before = {str(name) for name in json.loads((out / _MANIFEST).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        before = set()
    for name in before - now:
        path = (out / name).resolve()
        if path.is_relative_to(out.resolve()) and path.suffix in (".csv", ".png", ".pdf"):
            path.unlink(missing_ok=True)
    replace_file(out / _MANIFEST, _encoded(json.dumps(sorted(now), indent=0) + "\n"))


def _encoded(text: str) -> bytes:
    """UTF-8; half a surrogate, which a file's name or a token may hold, as its code."""
    return text.encode(errors="backslashreplace")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RequestError(
            f"the report's folder {out} cannot be written: {error.strerror or error}. Choose another with --out DIR."
        ) from error
