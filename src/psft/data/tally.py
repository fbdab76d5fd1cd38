"""What a whole source came to: the rows to train on, those left out, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psft.data.encode import EncodedBatch
from psft.data.rows import Rejection
from psft.errors import RequestError, shown

_LISTED_ROWS = 10
_ON_BAD_ROW = ("error", "skip")


@dataclass(frozen=True)
class DataReport:
    """What was found in a source. Counts are rows or tokens; lengths are tokens after truncation.

    Of pairs, lengths are those of the longer sequence, and num_tokens counts both.

    num_with_special_text: rows used that hold the string of a special token, which was tokenised as ordinary text.
    """

    source: str
    format: str
    num_rows: int
    num_used: int
    num_rejected: int
    num_truncated: int
    num_tokens: int
    num_trained_tokens: int
    length_quantiles: dict[str, int]
    reasons: dict[str, int]
    end_token: str
    num_with_special_text: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """All that comes of a source: `total` is its batches taken as one, `total.rows` an Arrow table or None."""

    source: str
    format_name: str
    end_token: str
    total: EncodedBatch


def gather(batches: Iterable[EncodedBatch]) -> EncodedBatch:
    """Consecutive batches as one, their rows as an Arrow table; None where no row is left."""
    import pyarrow as pa

    total = EncodedBatch(0)
    parts = []
    for batch in batches:
        total.num_rows += batch.num_rows
        total.rejections += batch.rejections
        total.num_truncated += batch.num_truncated
        total.num_trained_tokens += batch.num_trained_tokens
        total.num_too_long += batch.num_too_long
        total.num_with_special_text += batch.num_with_special_text
        total.first_special_text = total.first_special_text or batch.first_special_text
        if batch.rows is not None:
            parts.append(batch.rows)
    total.rows = pa.Table.from_batches(parts) if parts else None
    return total


def check_on_bad_row(on_bad_row: str) -> None:
    if on_bad_row not in _ON_BAD_ROW:
        raise RequestError(f"on_bad_row is {on_bad_row!r}; it is one of {', '.join(_ON_BAD_ROW)}.")


def stop_on_bad_rows(outcome: Outcome, on_bad_row: str, max_length: int | None) -> None:
    """Raise RequestError if rows cannot be used and should be, or none can."""
    total = outcome.total
    if total.num_too_long == total.num_rows:
        raise RequestError(
            f"{shown(outcome.source)}: all {total.num_rows} rows are longer than max_length={max_length} before their "
            "answer begins. Raise --max_length."
        )
    is_any_left = len(total.rejections) < total.num_rows
    refuse_bad_rows(outcome.source, total.rejections, total.num_rows, on_bad_row, is_any_left=is_any_left)


def refuse_bad_rows(
    source: str, bad: Sequence[Rejection], num_rows: int, on_bad_row: str, *, is_any_left: bool
) -> None:
    """Raise RequestError, with the first ten of them, if there are bad rows and `on_bad_row` is "error", or if there
    are no others."""
    if not bad or (is_any_left and on_bad_row == "skip"):
        return
    listed = "; ".join(f"{rejection.where}: {rejection.message}" for rejection in bad[:_LISTED_ROWS])
    more = f"; and {len(bad) - _LISTED_ROWS} more" if len(bad) > _LISTED_ROWS else ""
    if not is_any_left:
        raise RequestError(
            f"{shown(source)}: none of its {num_rows} rows can be used. {listed}{more}. Correct the data."
        )
    raise RequestError(
        f"{shown(source)}: {len(bad)} of {num_rows} rows cannot be used. {listed}{more}. "
        "Correct them, or pass --on_bad_row skip to leave them out."
    )


def make_report(outcome: Outcome) -> DataReport:
    """The report of an outcome with at least one row."""
    total = outcome.total
    lengths, num_tokens = _lengths(total.rows)
    p50, p95 = np.quantile(lengths, [0.5, 0.95], method="higher")
    return DataReport(
        source=outcome.source,
        format=outcome.format_name,
        num_rows=total.num_rows,
        num_used=len(lengths),
        num_rejected=len(total.rejections),
        num_truncated=total.num_truncated,
        num_tokens=num_tokens,
        num_trained_tokens=total.num_trained_tokens,
        length_quantiles={"p50": int(p50), "p95": int(p95), "max": int(lengths.max())},
        reasons=dict(Counter(rejection.reason for rejection in total.rejections).most_common()),
        end_token=outcome.end_token,
        num_with_special_text=total.num_with_special_text,
    )


def _lengths(rows: Any) -> tuple[np.ndarray, int]:
    """Tokens of each row, of pairs those of the longer sequence, and of all."""
    import pyarrow.compute as pc

    def of(name: str) -> np.ndarray:
        chunks = pc.list_value_length(rows[name]).chunks
        return np.concatenate([np.from_dlpack(chunk) for chunk in chunks])  # not `to_numpy`, which imports pandas

    if "input_ids" in rows.column_names:
        lengths = of("input_ids")
        return lengths, int(lengths.sum())
    prompt, chosen, rejected = of("prompt_ids"), of("chosen_ids"), of("rejected_ids")
    return prompt + np.maximum(chosen, rejected), int((2 * prompt + chosen + rejected).sum())


def write_rejections(path: Path, rejections: list[Rejection]) -> None:
    """Append the rows that were left out, one JSON object a line: a run's training and held-out data share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.writelines(f"{rejection.to_json()}\n" for rejection in rejections)
