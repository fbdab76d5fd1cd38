"""Scores as text: shares in percent, with their errors, in columns that stand under each other."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def percent(share: float) -> str:
    """`12.5` of 0.125."""
    return f"{100 * share:.1f}"


def with_error(share: float, stderr: float | None) -> str:
    """`12.5 ± 4.1`; without an error the share alone."""
    return percent(share) + (f" ± {100 * stderr:.1f}" if stderr is not None else "")


def interval(low: float | None, high: float | None) -> str:
    """`4.4 to 20.6`; `-` where there is none."""
    return "-" if low is None or high is None else f"{percent(low)} to {percent(high)}"


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Rows of cells, all of one length, as lines. left: columns of words; the others are numbers, set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
