"""The numbers of a report as CSV, at full resolution, UTF-8, empty where null.

tables/metrics/RUN.csv           every field of metrics.jsonl, a row a step
tables/clipped_tokens/RUN.csv    every token that was seen, not those of the cloud alone
tables/eval.csv, probe.csv       the rows of all runs, with a column `run`
tables/runs.csv                  one row a run: its settings that differ, its findings, its exact numbers
tables/table1.csv, table2.csv    scores as in the paper's tables: rows methods, columns benchmarks, shares in 0..1
tables/figures/NAME.csv          what figures compute from these: each plotted point, with band and error
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from psft.reports.charts import Figure
from psft.reports.load import Run
from psft.reports.score_cells import ScoreTable
from psft.runs.columns import Columns

_COMPUTED = (
    "clip",
    "log_ratios",
    "score_entropy",
    "in_domain",
    "out_of_domain",
    "alignment_tax",
    "epsilon_sweep",
    "drift",
)
"""Figures that average or combine; the others plot columns of metrics.jsonl as they are."""


def file_name(label: str) -> str:
    """A run's label as a file's name: letters, digits, `-_.=`; anything else becomes `_`."""
    plain = re.sub(r"[^\w.=-]+", "_", label, flags=re.ASCII).strip("._")
    return plain[:100] or "run"


class TableWriter:
    """Writes tables under `folder`. `take` is the sink of `load_run`: it gets long files while they are in memory.

    labels: of all runs; no two share a file.
    """

    def __init__(self, folder: Path, labels: list[str]) -> None:
        self.folder = folder
        self.written: list[Path] = []
        self._names: dict[str, str] = {}
        for label in labels:
            name, number = file_name(label), 2
            while name.lower() in (taken.lower() for taken in self._names.values()):  # file systems may fold case
                name, number = f"{file_name(label)}-{number}", number + 1
            self._names[label] = name

    def take(self, label: str, name: str, columns: Columns) -> None:
        """Write one long file of one run."""
        if not len(columns):
            return
        import pyarrow.csv

        stem = name.partition(".")[0]
        path = self.folder / stem / f"{self._names[label]}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.csv.write_csv(_flat(columns.table), path)
        self.written.append(path)

    def write(
        self,
        runs: list[Run],
        figures: Iterable[Figure],
        score_tables: Iterable[ScoreTable],
        summaries: list[dict[str, Any]],
    ) -> None:
        """Write what is short: rows of all runs together, one row a run, tables of scores, and what figures compute."""
        for name, rows_of in (("eval", lambda run: run.evals), ("probe", lambda run: run.probes)):
            self._write(f"{name}.csv", [{"run": run.label, **row} for run in runs for row in rows_of(run)])
        self._write("runs.csv", summaries)
        for table in score_tables:
            self._write(f"{table.name}.csv", scores(table))
        for figure in figures:
            if figure.name in _COMPUTED:
                self._write(f"figures/{figure.name}.csv", points(figure))

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        self.written.append(path)


def scores(table: ScoreTable) -> list[dict[str, Any]]:
    """A row a method; for each benchmark and the mean: score, error, ends over seeds, difference to the base, p."""
    rows = []
    for found in table.rows:
        row: dict[str, Any] = {"model": found.base, "method": found.method, "run": found.label}
        cells = {title: found.cells.get(name) for name, title in table.benchmarks.items()}
        for title, cell in {**cells, **({"mean": found.mean} if table.of_mean else {})}.items():
            values: dict[str, Any] = {} if cell is None else vars(cell)
            difference: dict[str, Any] = {} if cell is None or cell.difference is None else vars(cell.difference)
            row[title] = values.get("value")
            row |= {f"{title} {key}": values.get(key) for key in ("stderr", "low", "high", "num_runs", "k", "n")}
            row[f"{title} difference"] = difference.get("value")
            row[f"{title} difference_stderr"] = difference.get("stderr")
            row |= {f"{title} {key}": difference.get(key) for key in ("p_value", "p_holm", "test")}
        rows.append(row)
    return rows


def points(figure: Figure) -> list[dict[str, Any]]:
    """Every plotted point of a figure."""
    rows = []
    for chart in figure.charts:
        for line in chart.lines:
            for i, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
                place = chart.categories[int(x)] if chart.categories else x
                row = {"chart": chart.title, "line": line.label, chart.x_label: place, "value": y}
                for name in ("low", "high", "error", "notes"):
                    values: Sequence[Any] | None = getattr(line, name)
                    if values:
                        row[name] = values[i]
                rows.append(row)
    return rows


def _flat(table: Any) -> Any:
    """A table CSV can hold: lists become one column an item, nested objects are left out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_nested(column.type) and not pa.types.is_list(column.type):
            continue
        if not pa.types.is_list(column.type):
            columns[name] = column
            continue
        longest = pc.max(pc.list_value_length(column)).as_py() or 0
        padded = pc.list_slice(column, 0, longest, return_fixed_size_list=True) if longest else column
        for i in range(longest):
            columns[f"{name}_{i}"] = pc.list_element(padded, i)
    return pa.table(columns)
