"""Tables 1 and 2 of the paper: rows methods, columns benchmarks, differences to the base, and remarks on them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from psft.reports import benchmarks
from psft.reports.charts import Missing
from psft.reports.evaluations import Evaluation, Measurement
from psft.reports.figures.common import Inputs, needs_command
from psft.reports.groups import Group
from psft.reports.score_cells import Row, ScoreTable, add_means, cell_of, correct, difference_of
from psft.reports.score_sources import NO_NAME, base_name, base_scores, chosen

_TABLES = (
    ("table1", "In-domain", "1", benchmarks.IN_DOMAIN, "math"),
    ("table2", "Out-of-domain", "2", benchmarks.OUT_OF_DOMAIN, "ood"),
)
_MOST_NOTES, _MOST_MISSING = 24, 8


def make_tables(inputs: Inputs, bases: Sequence[Evaluation] = ()) -> list[ScoreTable]:
    """Both tables. bases: results of models before training, beside step 0 of the runs themselves."""
    return [_make(inputs, bases, *of_table) for of_table in _TABLES]


def _make(
    inputs: Inputs, bases: Sequence[Evaluation], name: str, title: str, paper: str, known: Mapping[str, str], suite: str
) -> ScoreTable:
    of_runs = {run.label: chosen(run, known) for run in inputs.runs}
    of_bases, taken = base_scores(inputs.runs, bases, known)
    table = ScoreTable(name, f"{title} scores", paper, {}, [])
    compared: list[str] = []
    for model in dict.fromkeys(base_name(run) for run in inputs.runs):
        if of_bases.get(model):
            scores = {name: cell_of([found]) for name, found in of_bases[model].items()}
            table.rows.append(Row(model, "before training", model, True, scores))
        for group in inputs.groups:
            if base_name(group.run) == model:
                row, words = _row(group, of_runs, of_bases.get(model, {}))
                table.rows += [row] if row.cells else []
                compared += words
    measured = {name for row in table.rows for name in row.cells}
    table.benchmarks = {name: known[name] for name in known if name in measured}
    add_means(table)
    correct(table)
    found = {run.label: of_runs[run.label].values() for run in inputs.runs}
    table.notes = [*taken, *compared, *_notes(table, found | {m: scores.values() for m, scores in of_bases.items()})]
    table.missing = _missing(inputs, table, known, suite)
    return table


def _row(
    group: Group, of_runs: Mapping[str, Mapping[str, Measurement]], base: Mapping[str, Measurement]
) -> tuple[Row, list[str]]:
    """The row of a group, and what of its differences is not as it should be."""
    row = Row(group.label, str(group.run.objective.get("name") or "unknown"), base_name(group.run), False)
    names = dict.fromkeys(name for run in group.runs for name in of_runs[run.label])
    found = {n: [of_runs[run.label][n] for run in group.runs if n in of_runs[run.label]] for n in names}
    for name, some in found.items():
        difference = difference_of(some, base[name]) if name in base else None
        row.cells[name] = replace(cell_of(some), difference=difference)
    return row, _comparability(row, found, base)


def _notes(table: ScoreTable, measured: Mapping[str, Iterable[Measurement]]) -> list[str]:
    """What a reader should know of single scores; measured: what the table is made of, by run or base model."""
    said = [
        f"{label}, {table.benchmarks[m.benchmark]}: {'; '.join(m.remarks)}."
        for label, found in measured.items()
        for m in found
        if m.remarks and m.benchmark in table.benchmarks
    ]
    if len(said) > _MOST_NOTES:
        said = [*said[:_MOST_NOTES], f"{len(said) - _MOST_NOTES:,} remarks more; the results files have them."]
    for row in table.rows:
        steps = {cell.steps for cell in row.cells.values() if cell.steps}
        if len(steps) > 1:
            every = ", ".join(str(step) for step in sorted({step for some in steps for step in some}))
            said.append(f"{row.label}: its scores are of several steps ({every}).")
    return said


def _comparability(row: Row, found: Mapping[str, Sequence[Measurement]], base: Mapping[str, Measurement]) -> list[str]:
    """Where differences to the base are none, unpaired, or between what was asked differently."""
    other, unpaired, asked = [], [], []
    for name, some in found.items():
        if name not in base:
            continue
        difference = row.cells[name].difference
        if difference is None:
            other.append(name)
        elif difference.test == "independent":
            unpaired.append(name)
        elif any(m.asked != base[name].asked for m in some):
            asked.append(name)
    return [
        f"{row.label} and its base {words}: {', '.join(benchmarks.title((name, 'accuracy', None)) for name in names)}."
        for names, words in (
            (other, "were asked items of different files, so that no difference is given"),
            (unpaired, "are compared by standard errors alone; results files of both (--base) compare item by item"),
            (asked, "were not asked alike (prompt, sampling or k)"),
        )
        if names
    ]


def _missing(inputs: Inputs, table: ScoreTable, known: Mapping[str, str], suite: str) -> list[Missing]:
    """What the table lacks, and the commands that measure it."""
    if not inputs.runs:
        return []
    first = inputs.runs[0]

    def titles(names: Iterable[str]) -> str:
        return ", ".join(known[name] for name in names)

    if not table.benchmarks:
        reason = f"No {table.title.lower().partition(' ')[0]} benchmark ({titles(known)}) has been measured."
        return [needs_command(inputs, reason, "eval", f"{shlex.quote(first.path)} --suite {suite}")]
    found = []
    for group in inputs.groups:
        cells = next((row.cells for row in table.rows if row.label == group.label and not row.is_base), {})
        lacking = [name for name in table.benchmarks if name not in cells]
        if lacking:
            words = f"{group.label} lacks {titles(lacking)}."
            found.append(needs_command(inputs, words, "eval", f"{shlex.quote(group.run.path)} --suite {suite}"))
    absent = [name for name in known if name not in table.benchmarks]
    if absent:
        words = f"{titles(absent)}: measured for none of these runs."
        found.append(needs_command(inputs, words, "eval", f"{shlex.quote(first.path)} --suite {suite}"))
    for model in dict.fromkeys(row.base for row in table.rows if not row.is_base):
        if not any(row.is_base and row.base == model for row in table.rows):
            run = next(run for run in inputs.runs if base_name(run) == model)
            where = "BASE" if model == NO_NAME else shlex.quote(model)
            words = f"{model} has not been measured before training, so there are no differences to it."
            arguments = f"{where} --suite {suite} --run_dir {shlex.quote(run.path)} --step 0"
            found.append(needs_command(inputs, words, "eval", arguments))
    return [*found[:_MOST_MISSING], *([Missing("More is missing in the same way.")] if found[_MOST_MISSING:] else [])]
