"""The tables of scores as data: cells with errors over items and seeds, differences to the base and their p-values.

Seeds are averaged item by item, so that the error over items is right although all seeds were asked the same.
Differences are paired by item where both sides' items are known (`psft.evaluation.statistics.paired_test`). Holm's
correction makes the chance of one false star in a table at most 5 %, whatever depends on what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from psft.evaluation.statistics import holm, independent_mean, independent_p_value, paired_test
from psft.reports.charts import Missing
from psft.reports.evaluations import Measurement

SIGNIFICANT = 0.05
"""Of p-values after Holm's correction over all differences of a table."""
_MOST_FLIPPED = 2000
"""Items up to which signs are flipped for the p-value; above, the mean of the differences is as good as normal."""


@dataclass
class Difference:
    """To the base. test: `paired` over the n items both have; `independent`, from both errors; `mean` of others.

    p_holm: p_value after Holm's correction, None until the table is whole.
    """

    value: float
    stderr: float | None
    p_value: float | None
    test: str
    n: int | None
    p_holm: float | None = None

    @property
    def is_significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class Cell:
    """A score in 0..1, the mean over seeds; low, high: the smallest and largest of several seeds, else None."""

    value: float
    stderr: float | None
    num_runs: int
    low: float | None = None
    high: float | None = None
    k: int | None = None
    n: int | None = None
    steps: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    difference: Difference | None = None


@dataclass
class Row:
    """label: of a base its model's name, else of the runs. base: the model's name that it started from."""

    label: str
    method: str
    base: str
    is_base: bool
    cells: dict[str, Cell] = field(default_factory=dict)
    mean: Cell | None = None

    @property
    def steps(self) -> list[int]:
        """Of training, after which its scores were measured."""
        return [] if self.is_base else sorted({step for cell in self.cells.values() for step in cell.steps})


@dataclass
class ScoreTable:
    """benchmarks: canonical name to title, of those that any row has. of_mean: those that all rows have."""

    name: str
    title: str
    paper: str
    benchmarks: dict[str, str]
    rows: list[Row]
    of_mean: tuple[str, ...] = ()
    num_tests: int = 0
    notes: list[str] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cell_of(found: Sequence[Measurement]) -> Cell:
    """One seed as measured; several: the mean, its error over items, which all seeds were asked."""
    values = [m.value for m in found]
    several = len(values) > 1
    return Cell(
        float(np.mean(values)), _stderr(found), len(found), min(values) if several else None,
        max(values) if several else None, found[0].k, found[0].n,
        tuple(sorted({m.step for m in found if m.step is not None})), tuple(dict.fromkeys(m.source for m in found)),
    )  # fmt: skip


def _stderr(found: Sequence[Measurement]) -> float | None:
    """Of the mean over seeds. Without items the mean of the errors, which the true one does not exceed."""
    if len(found) > 1 and (means := _item_means(found)) is not None and len(means) > 1:
        return float(np.std(list(means.values()), ddof=1) / math.sqrt(len(means)))
    errors = [m.stderr for m in found if m.stderr is not None]
    return float(np.mean(errors)) if len(errors) == len(found) else None


def _item_means(found: Sequence[Measurement]) -> dict[str, float] | None:
    """Mean over seeds of every item that all have; None if one has none, or they are of different data."""
    items = [m.items for m in found if m.items]
    if len(items) < len(found) or len({m.data for m in found}) > 1:
        return None
    return {name: float(np.mean([of[name] for of in items])) for name in items[0] if all(name in of for of in items)}


def difference_of(found: Sequence[Measurement], base: Measurement) -> Difference | None:
    """None where they were asked items of different files: such scores do not compare."""
    if base.data is not None and any(m.data not in (None, base.data) for m in found):
        return None
    ours = _item_means(found)
    shared = [name for name in ours if name in base.items] if ours and base.items else []
    if ours and base.items and len(shared) > 1:
        pairs = [ours[name] for name in shared], [base.items[name] for name in shared]
        if len(shared) <= _MOST_FLIPPED:
            test = paired_test(*pairs)
            return Difference(test.difference, test.stderr, test.p_value, "paired", test.n)
        apart = np.subtract(*pairs)
        value, stderr = float(apart.mean()), float(apart.std(ddof=1) / math.sqrt(len(apart)))
        return Difference(value, stderr, independent_p_value(value, stderr), "paired", len(apart))
    value = float(np.mean([m.value for m in found])) - base.value
    return _independent(value, _stderr(found), base.stderr)


def _independent(value: float, one: float | None, other: float | None) -> Difference:
    if one is None or other is None:
        return Difference(value, None, None, "independent", None)
    stderr = math.hypot(one, other)
    return Difference(value, stderr, independent_p_value(value, stderr), "independent", None)


def add_means(table: ScoreTable) -> None:
    """Means over the benchmarks that every row has: over other sets they would not compare."""
    table.of_mean = tuple(name for name in table.benchmarks if all(name in row.cells for row in table.rows))
    if len(table.of_mean) < 2:
        table.of_mean = ()
        return
    for row in table.rows:
        cells = [row.cells[name] for name in table.of_mean]
        differences = [cell.difference for cell in cells if cell.difference is not None]
        difference = None
        if len(differences) == len(cells):
            apart = independent_mean([d.value for d in differences], [d.stderr for d in differences])
            p_value = None if apart.stderr is None else independent_p_value(apart.value, apart.stderr)
            difference = Difference(apart.value, apart.stderr, p_value, "mean", None)
        mean = independent_mean([cell.value for cell in cells], [cell.stderr for cell in cells])
        row.mean = Cell(mean.value, mean.stderr, max(cell.num_runs for cell in cells), difference=difference)


def correct(table: ScoreTable) -> None:
    """Holm's step-down correction over every difference of the table, means included."""
    cells = [cell for row in table.rows for cell in (*row.cells.values(), row.mean) if cell is not None]
    tested = [cell.difference for cell in cells if cell.difference is not None]
    known = [(difference, difference.p_value) for difference in tested if difference.p_value is not None]
    table.num_tests = len(known)
    for (difference, _), p_holm in zip(known, holm([p_value for _, p_value in known]), strict=True):
        difference.p_holm = p_holm
