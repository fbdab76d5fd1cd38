"""From a source to a tokenised data set with loss mask, a report of what was found, and the rejected rows.

Lifecycle of a row: read (`sources`) -> recognised (`formats`) -> checked (`validate`) -> rendered and tokenised
(`render`) -> cut at `max_length` -> stored, or rejected with a reason at any of these. Large sources are encoded by
several processes (`workers`); what came of a source can be kept for the next run (`prepared_cache`).
"""

from __future__ import annotations

import logging
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psft.data.digests import digest_of_code, digest_of_tokenizer, digest_of_values
from psft.data.encode import BatchEncoder, RowEncoder
from psft.data.formats import Format, choose_format
from psft.data.prepared_cache import PreparedCache
from psft.data.render import decode
from psft.data.rows import Row
from psft.data.sources import Source, open_source
from psft.data.tally import (
    DataReport,
    Outcome,
    check_on_bad_row,
    gather,
    make_report,
    stop_on_bad_rows,
    write_rejections,
)
from psft.data.workers import in_order
from psft.errors import RequestError, shown
from psft.labels import IGNORE_INDEX
from psft.machine import local_ranks, logical_cores

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ROWS_TO_RECOGNISE = 100
_BATCH_ROWS = 256
_SMALL = 16 * _BATCH_ROWS  # rows that one process encodes in the time that others would take to start
_MOST_PROCESSES = 16  # the process that reads the rows and takes the results keeps no more than these busy
_QUICK_DIGEST = 1 << 28  # bytes; digesting more takes longer than encoding a few rows


@dataclass(frozen=True)
class Kind:
    """What kind of rows a source holds.

    recognise: (values of its first rows, dataset_format=, columns=, source=) -> their format, or RequestError.
    encoder: (tokenizer, format, columns=, system_prompt=, max_length=, ...) -> what encodes batches of them.
    """

    name: str
    recognise: Callable[..., Format]
    encoder: Callable[..., BatchEncoder]


DEMONSTRATIONS = Kind("demonstrations", choose_format, RowEncoder)


@dataclass(frozen=True)
class Prepared:
    """table: Arrow, columns input_ids and labels (aligned, not shifted; -100 = not trained).

    Of pairs: prompt_ids, chosen_ids and rejected_ids, the answers with their end token.

    cached_in: the folder it was read from, as an earlier run had prepared it; None if it was prepared now.
    """

    table: Any
    report: DataReport
    cached_in: Path | None = None

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """The table as a data set of `datasets`, whose import takes most of a second."""
        import datasets

        # Without a name of its own, `datasets` would find one by reading every row
        return datasets.Dataset(self.table, fingerprint=uuid.uuid4().hex)


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
    num_processes: int | None = None,
    cache_dir: Path | None = None,
) -> Prepared:
    """Read, check, render and tokenise `source`.

    Args:
        max_length: tokens kept per sequence, counted from its start; None keeps all.
        on_bad_row: "error" stops after the last row and lists the first ten bad ones; "skip" leaves them out.
        rejected_path: where rejected rows are written, one JSON object a line; nothing is written if there is none.
        description: what the progress bar is called; the bar shows after two seconds.
        num_processes: that encode a source of more than 4096 rows; the result is the same. None = one a core, 16 at
            most.
        cache_dir: folder of prepared data sets (`PreparedCache`), read and written; None = neither.
    Raises:
        RequestError: the source cannot be read, its format is unknown, rows are bad and `on_bad_row` is "error", or
            no row is left.
        RunFailed: a process that encodes died.
    """
    return prepare_source(
        source, DEMONSTRATIONS, tokenizer=tokenizer, max_length=max_length, split=split, config_name=config_name,
        dataset_format=dataset_format, columns=columns, system_prompt=system_prompt, on_bad_row=on_bad_row,
        rejected_path=rejected_path, max_rows=max_rows, description=description, num_processes=num_processes,
        cache_dir=cache_dir,
    )  # fmt: skip


def prepare_source(
    source: str,
    kind: Kind,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    split: str,
    config_name: str | None,
    dataset_format: str,
    columns: Mapping[str, str] | None,
    system_prompt: str | None,
    on_bad_row: str,
    rejected_path: Path | None,
    max_rows: int | None,
    description: str,
    num_processes: int | None,
    cache_dir: Path | None,
    **more: Any,
) -> Prepared:
    """`prepare_dataset` for rows of any kind.

    Args:
        more: further options of the kind's encoder, plain values.
    """
    check_on_bad_row(on_bad_row)
    if max_length is not None and max_length < 2:
        raise RequestError(f"max_length is {max_length}; a sequence needs at least 2 tokens.")
    if num_processes is not None and num_processes < 1:
        raise RequestError(f"the number of processes is {num_processes}; give 1 or more.")
    if system_prompt is not None:
        _require_encodable(system_prompt)
    opened = open_source(source, split=split, config_name=config_name)
    options: dict[str, Any] = {
        "dataset_format": dataset_format,
        "columns": None if columns is None else dict(columns),
        "system_prompt": system_prompt,
        "max_length": max_length,
        **more,
    }

    encode = partial(_encode, opened, kind, tokenizer, description, max_rows, num_processes, **options)
    is_worth_keeping = max_rows is None or max_rows > _SMALL or opened.num_bytes < _QUICK_DIGEST
    if cache_dir is not None and is_worth_keeping:
        outcome, is_cached = _kept_or_made(
            opened, tokenizer, cache_dir, encode, max_rows=max_rows, kind=kind.name, **options
        )
    else:
        outcome, is_cached = encode(), False
    total = outcome.total
    if total.num_with_special_text:
        logger.warning(
            "%s: the text of a special token stands in %d of %d rows, first %s; it is tokenised as ordinary text.",
            shown(source), total.num_with_special_text, total.num_rows, total.first_special_text,
        )  # fmt: skip
    if rejected_path is not None and total.rejections:
        write_rejections(Path(rejected_path), total.rejections)
    stop_on_bad_rows(outcome, on_bad_row, max_length)
    return Prepared(total.rows, make_report(outcome), cache_dir if is_cached else None)


def _kept_or_made(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    encode: Callable[[], Outcome],
    **options: Any,
) -> tuple[Outcome, bool]:
    """What an earlier run has kept, and True; else what `encode` makes, which is kept, and False.

    The source is digested again once it has been read. Where it is another, or was written meanwhile, nothing is kept:
    the name of the entry would be that of other rows.
    """
    of_tokenizer = digest_of_tokenizer(tokenizer)
    if of_tokenizer is None:
        logger.info("the prepared data are not kept: this tokenizer runs code that a digest cannot see.")
        return encode(), False
    stamp, content = source.stamp(), source.digest()
    parts = {"source": source.name, "content": content, "tokenizer": of_tokenizer, "code": digest_of_code()}
    cache = PreparedCache(cache_dir, digest_of_values(parts | options)[:32])
    with cache.locked() as is_alone:
        kept = cache.read()
        if kept is not None:
            return kept, True
        made = encode()
        if _is_another(source, stamp, content):
            logger.warning(
                "%s was written while it was read: the run has the rows it held then, and they are not kept for "
                "another. Start again once it is whole.",
                shown(source.name),
            )
        elif is_alone:
            cache.write(made)
    return made, False


def _is_another(source: Source, stamp: object, content: str) -> bool:
    try:
        return source.digest() != content or source.stamp() != stamp
    except RequestError:  # it is gone
        return True


def _encode(
    source: Source,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    description: str,
    max_rows: int | None,
    num_processes: int | None,
    *,
    dataset_format: str,
    columns: Mapping[str, str] | None,
    **options: Any,
) -> Outcome:
    rows = source.rows(max_rows)
    head = list(islice(rows, _SMALL + 1))
    seen = [row.value for row in head[:_ROWS_TO_RECOGNISE] if row.problem is None]
    format = kind.recognise(seen, dataset_format=dataset_format, columns=columns, source=source.name)
    encode = kind.encoder(tokenizer, format, columns=columns, **options)
    batches = _batches(_with_progress(chain(head, rows), description))
    is_small = len(head) <= _SMALL
    total = gather(in_order(encode, batches, 1 if is_small else _processes(num_processes, tokenizer)))
    return Outcome(source.name, format.name, encode.end_token, total)


def _processes(wanted: int | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many encode a large source: as many as asked for, else one a core of this rank's share, 16 at most."""
    number = wanted or max(1, min(logical_cores() // local_ranks(), _MOST_PROCESSES))
    if number > 1 and digest_of_tokenizer(tokenizer) is None:
        logger.info("one process prepares the data: this tokenizer runs code that another may not have.")
        return 1
    return number


def render_example(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> str:
    """One sequence as text: a line saying how to read it, then trained tokens between ⟦ and ⟧, special tokens shown."""
    row = prepared.table.slice(index, 1).to_pylist()[0]
    is_trained = [label != IGNORE_INDEX for label in row["labels"]]
    text, start = [], 0
    for stop in range(1, len(is_trained) + 1):
        if stop == len(is_trained) or is_trained[stop] != is_trained[start]:
            run = visible(decode(tokenizer, row["input_ids"][start:stop]))
            text.append(f"⟦{run}⟧" if is_trained[start] else run)
            start = stop
    legend = (
        f"example {index}: {len(is_trained)} tokens, {sum(is_trained)} trained (between ⟦ and ⟧), "
        f"end token {prepared.report.end_token}"
    )
    return f"{legend}\n{''.join(text)}"


def visible(text: str) -> str:
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
