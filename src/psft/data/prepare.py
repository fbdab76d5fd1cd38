"""From a source to a tokenised data set with loss mask, a report of what was found, and the rejected rows.

Lifecycle of a row: read (`sources`) -> recognised (`formats`) -> checked (`validate`) -> rendered and tokenised
(`render`) -> cut at `max_length` -> stored, or rejected with a reason at any of these.
"""

from __future__ import annotations

import logging
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from psft.data.formats import Format, choose_format
from psft.data.render import Encoded, Encoder, Rendered, decode, make_renderer
from psft.data.rows import Rejection, Row, RowRejected
from psft.data.sources import read_rows
from psft.data.validate import to_conversation
from psft.errors import RequestError, shown
from psft.ops import IGNORE_INDEX

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ROWS_TO_RECOGNISE = 100
_BATCH_ROWS = 256
_LISTED_ROWS = 10
_ON_BAD_ROW = ("error", "skip")


@dataclass(frozen=True)
class DataReport:
    """What `prepare_dataset` found. Counts are rows or tokens; lengths are tokens after truncation.

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
class Prepared:
    """table: Arrow, columns input_ids and labels (aligned, not shifted; -100 = not trained)."""

    table: Any
    report: DataReport

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """The table as a data set of `datasets`, which a plan does without: its import takes most of a second."""
        import datasets

        # Without a name of its own, `datasets` would find one by reading every row
        return datasets.Dataset(self.table, fingerprint=uuid.uuid4().hex)


@dataclass
class _Tally:
    """What has come out so far: encoded batches, and everything the report counts."""

    batches: list[Any] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    num_rows: int = 0
    num_truncated: int = 0
    num_trained_tokens: int = 0
    num_too_long: int = 0
    num_with_special_text: int = 0
    first_special_text: str = ""


def prepare_dataset(
    source: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    split: str = "train",
    config_name: str | None = None,
    dataset_format: str = "auto",
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    on_bad_row: str = "error",
    rejected_path: Path | None = None,
    max_rows: int | None = None,
    description: str = "data",
) -> Prepared:
    """Read, check, render and tokenise `source`.

    Args:
        max_length: tokens kept per sequence, counted from its start; None keeps all.
        on_bad_row: "error" stops after the last row and lists the first ten bad ones; "skip" leaves them out.
        rejected_path: where rejected rows are written, one JSON object a line; nothing is written if there is none.
        description: what the progress bar is called; the bar shows after two seconds.
    Raises:
        RequestError: the source cannot be read, its format is unknown, rows are bad and `on_bad_row` is "error", or
            no row is left.
    """
    if on_bad_row not in _ON_BAD_ROW:
        raise RequestError(f"on_bad_row is {on_bad_row!r}; it is one of {', '.join(_ON_BAD_ROW)}.")
    if max_length is not None and max_length < 2:
        raise RequestError(f"max_length is {max_length}; a sequence needs at least 2 tokens.")
    if system_prompt is not None:
        _require_encodable(system_prompt)
    rows = read_rows(source, split=split, config_name=config_name, max_rows=max_rows)
    head = list(islice(rows, _ROWS_TO_RECOGNISE))
    format = choose_format(
        (row.value for row in head if row.problem is None),
        dataset_format=dataset_format,
        columns=columns,
        source=source,
    )
    renderer, encoder = make_renderer(tokenizer, format.name)

    def pieces_of(row: Row) -> Rendered:
        try:
            conversation = to_conversation(row, format, columns=columns, system_prompt=system_prompt)
            encoder.require_kept(conversation)
            return renderer.pieces(conversation)
        except RequestError as error:  # the chat template had to be stopped
            raise RequestError(f"{row.where}: {error}") from error

    tally = _Tally()
    for batch in _batches(_with_progress(chain(head, rows), description)):
        _encode_batch(batch, pieces_of, encoder, max_length, tally)
    if tally.num_with_special_text:
        logger.warning(
            "%s: the text of a special token stands in %d of %d rows, first %s; it is tokenised as ordinary text.",
            shown(source), tally.num_with_special_text, tally.num_rows, tally.first_special_text,
        )  # fmt: skip
    if rejected_path is not None and tally.rejections:
        _write_rejections(Path(rejected_path), tally.rejections)
    _stop_on_bad_rows(source, tally, on_bad_row, max_length)
    return Prepared(_to_table(tally), _make_report(source, format, tally, renderer.end_token))


def render_example(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> str:
    """One sequence as text: a line saying how to read it, then trained tokens between ⟦ and ⟧, special tokens shown."""
    row = prepared.table.slice(index, 1).to_pylist()[0]
    is_trained = [label != IGNORE_INDEX for label in row["labels"]]
    text, start = [], 0
    for stop in range(1, len(is_trained) + 1):
        if stop == len(is_trained) or is_trained[stop] != is_trained[start]:
            run = _visible(decode(tokenizer, row["input_ids"][start:stop]))
            text.append(f"⟦{run}⟧" if is_trained[start] else run)
            start = stop
    legend = (
        f"example {index}: {len(is_trained)} tokens, {sum(is_trained)} trained (between ⟦ and ⟧), "
        f"end token {prepared.report.end_token}"
    )
    return f"{legend}\n{''.join(text)}"


def _visible(text: str) -> str:
    """Text for a terminal: line breaks as they are, control and direction characters as escapes."""
    return "".join(
        ascii(letter)[1:-1] if unicodedata.category(letter) in ("Cc", "Cf") and letter not in "\n\t" else letter
        for letter in text
    )


def _require_encodable(system_prompt: str) -> None:
    try:
        system_prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            "system_prompt holds a lone surrogate, a character that no encoding has. Give it as UTF-8 text."
        ) from error


def _with_progress(rows: Iterator[Row], description: str) -> Iterator[Row]:
    from tqdm import tqdm

    return iter(tqdm(rows, desc=description, unit="row", delay=2, leave=False))


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch


def _encode_batch(
    batch: list[Row], pieces_of: Callable[[Row], Rendered], encoder: Encoder, max_length: int | None, tally: _Tally
) -> None:
    """Validate and tokenise a batch; good rows and rejections go to `tally`, in the order of the source."""
    tally.num_rows += len(batch)
    rendered: list[Rendered | RowRejected] = []
    for row in batch:
        try:
            rendered.append(pieces_of(row))
        except RowRejected as error:
            rendered.append(error)
        except RecursionError:
            rendered.append(RowRejected("nested too deeply"))
    encoded = iter(encoder.encode([item for item in rendered if isinstance(item, Rendered)]))
    kept: list[Encoded] = []
    for row, item in zip(batch, rendered, strict=True):
        found = next(encoded) if isinstance(item, Rendered) else item
        if isinstance(found, RowRejected):
            tally.rejections.append(Rejection.of(row, found))
            continue
        ids, labels = found
        cut_ids, cut_labels = ids[:max_length], labels[:max_length]
        num_trained = len(cut_labels) - cut_labels.count(IGNORE_INDEX)
        if num_trained == 0:
            tally.num_too_long += max_length is not None and len(ids) > max_length
            tally.rejections.append(Rejection.of(row, _nothing_trained(len(ids), max_length)))
            continue
        if isinstance(item, Rendered) and item.quotes:
            tally.num_with_special_text += 1
            tally.first_special_text = tally.first_special_text or f"{min(item.quotes.values())!r} in {row.where}"
        tally.num_truncated += len(cut_ids) < len(ids)
        tally.num_trained_tokens += num_trained
        tally.lengths.append(len(cut_ids))
        kept.append((cut_ids, cut_labels))
    if kept:
        tally.batches.append(_to_arrow(kept))


def _nothing_trained(length: int, max_length: int | None) -> RowRejected:
    if max_length is None or length <= max_length:
        return RowRejected("no token to train")
    return RowRejected(f"no answer token within max_length={max_length}", f"{length} tokens")


def _to_arrow(rows: list[tuple[list[int], list[int]]]) -> Any:
    """A batch as two int32 list columns: a twentieth of what Python lists of ints take."""
    import pyarrow as pa

    def int32(values: np.ndarray) -> Any:  # `pa.array` would import pandas, to ask whether they are a series of its own
        return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])

    offsets = int32(np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int32))
    columns = []
    for column in zip(*rows, strict=True):
        values = np.concatenate([np.asarray(one, dtype=np.int32) for one in column])
        columns.append(pa.ListArray.from_arrays(offsets, int32(values)))
    return pa.RecordBatch.from_arrays(columns, names=["input_ids", "labels"])


def _to_table(tally: _Tally) -> Any:
    import pyarrow as pa

    return pa.Table.from_batches(tally.batches)


def _write_rejections(path: Path, rejections: list[Rejection]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:  # training and evaluation data of one run share the file
        lines.writelines(f"{rejection.to_json()}\n" for rejection in rejections)


def _stop_on_bad_rows(source: str, tally: _Tally, on_bad_row: str, max_length: int | None) -> None:
    if tally.num_too_long == tally.num_rows:
        raise RequestError(
            f"{shown(source)}: all {tally.num_rows} rows are longer than max_length={max_length} before their answer "
            "begins. Raise --max_length."
        )
    if not tally.rejections:
        return
    bad = tally.rejections[:_LISTED_ROWS]
    listed = "; ".join(f"{rejection.where}: {rejection.message}" for rejection in bad)
    count = len(tally.rejections)
    more = f"; and {count - len(bad)} more" if count > len(bad) else ""
    if count == tally.num_rows:
        raise RequestError(f"{shown(source)}: none of its {count} rows can be used. {listed}{more}. Correct the data.")
    if on_bad_row == "error":
        raise RequestError(
            f"{shown(source)}: {count} of {tally.num_rows} rows cannot be used. {listed}{more}. "
            "Correct them, or pass --on_bad_row skip to leave them out."
        )


def _make_report(source: str, format: Format, tally: _Tally, end_token: str) -> DataReport:
    p50, p95 = np.quantile(tally.lengths, [0.5, 0.95], method="higher")
    return DataReport(
        source=source,
        format=format.name,
        num_rows=tally.num_rows,
        num_used=len(tally.lengths),
        num_rejected=len(tally.rejections),
        num_truncated=tally.num_truncated,
        num_tokens=sum(tally.lengths),
        num_trained_tokens=tally.num_trained_tokens,
        length_quantiles={"p50": int(p50), "p95": int(p95), "max": max(tally.lengths)},
        reasons=dict(Counter(rejection.reason for rejection in tally.rejections).most_common()),
        end_token=end_token,
        num_with_special_text=tally.num_with_special_text,
    )
