"""A batch of rows becomes token ids and labels, or rejections: the part of the preparation that takes the time.

It depends on nothing but the batch, so batches can be encoded in any process, in any order. An encoder that is sent to
another process carries the digest of its tokenizer and is refused where it arrives as another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from psft.data.digests import digest_of_tokenizer
from psft.data.formats import Format
from psft.data.render import Encoded, Rendered, make_renderer
from psft.data.rows import Rejection, Row, RowRejected
from psft.data.validate import to_conversation
from psft.errors import RequestError, RunFailed
from psft.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


@dataclass
class EncodedBatch:
    """What became of some consecutive rows.

    rows: Arrow record batch of the good ones, or None. rejections: of the others, in the order of the source.
    num_too_long: rejected because the answer begins beyond `max_length`. num_with_special_text: good rows that hold
    the string of a special token; first_special_text names the first.
    """

    num_rows: int
    rows: Any = None
    rejections: list[Rejection] = field(default_factory=list)
    num_truncated: int = 0
    num_trained_tokens: int = 0
    num_too_long: int = 0
    num_with_special_text: int = 0
    first_special_text: str = ""


class BatchEncoder(ABC):
    """Checks, renders, tokenises and cuts rows of one format. What a row becomes is left to the class below it.

    Args:
        rendered_as: name of the format whose way of rendering is used; default the rows' own.
    Raises:
        RequestError: the tokenizer or its template cannot be used for this format.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        format: Format,
        *,
        columns: Mapping[str, str] | None,
        system_prompt: str | None,
        max_length: int | None,
        rendered_as: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._renderer, self._encoder = make_renderer(tokenizer, rendered_as or format.name)
        self._format = format
        self._columns = columns
        self._system_prompt = system_prompt
        self._max_length = max_length
        self.end_token = self._renderer.end_token

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_named": digest_of_tokenizer(self._tokenizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises RunFailed: another process has made something else of the tokenizer."""
        named = state.pop("_named")
        self.__dict__.update(state)
        if named is None or digest_of_tokenizer(self._tokenizer) != named:
            raise RunFailed(
                "this tokenizer does not arrive whole in another process. Prepare in this one: --dataset_num_proc 1."
            )

    @abstractmethod
    def __call__(self, batch: list[Row]) -> EncodedBatch:
        """Good rows and rejections of a batch, each in the order of the source.

        Raises:
            RequestError: the chat template had to be stopped.
        """

    def _guarded(self, row: Row, render: Callable[[Row], Item]) -> Item | RowRejected:
        """What `render` makes of a row, or why it cannot be used."""
        try:
            return render(row)
        except RowRejected as rejected:
            return rejected
        except RecursionError:
            return RowRejected("nested too deeply")
        except RequestError as error:  # the chat template had to be stopped
            raise RequestError(f"{row.where}: {error}") from error


class RowEncoder(BatchEncoder):
    """Demonstrations: columns `input_ids` and `labels`."""

    def __call__(self, batch: list[Row]) -> EncodedBatch:
        rendered = [self._guarded(row, self._pieces) for row in batch]
        encoded = iter(self._encoder.encode([item for item in rendered if isinstance(item, Rendered)]))
        result = EncodedBatch(len(batch))
        kept: list[Encoded] = []
        for row, item in zip(batch, rendered, strict=True):
            found = next(encoded) if isinstance(item, Rendered) else item
            if isinstance(found, RowRejected):
                result.rejections.append(Rejection.of(row, found))
                continue
            ids, labels = found
            cut_ids, cut_labels = ids[: self._max_length], labels[: self._max_length]
            num_trained = len(cut_labels) - cut_labels.count(IGNORE_INDEX)
            if num_trained == 0:
                result.num_too_long += self._max_length is not None and len(ids) > self._max_length
                result.rejections.append(Rejection.of(row, self._nothing_trained(len(ids))))
                continue
            if isinstance(item, Rendered) and item.quotes:
                result.num_with_special_text += 1
                result.first_special_text = result.first_special_text or f"{min(item.quotes.values())!r} in {row.where}"
            result.num_truncated += len(cut_ids) < len(ids)
            result.num_trained_tokens += num_trained
            kept.append((cut_ids, cut_labels))
        if kept:
            ids_column, labels_column = zip(*kept, strict=True)
            result.rows = int32_lists({"input_ids": ids_column, "labels": labels_column})
        return result

    def _pieces(self, row: Row) -> Rendered:
        conversation = to_conversation(row, self._format, columns=self._columns, system_prompt=self._system_prompt)
        self._encoder.require_kept(conversation)
        return self._renderer.pieces(conversation)

    def _nothing_trained(self, length: int) -> RowRejected:
        if self._max_length is None or length <= self._max_length:
            return RowRejected("no token to train")
        return RowRejected(f"no answer token within max_length={self._max_length}", f"{length} tokens")


def int32_lists(columns: Mapping[str, Sequence[Sequence[int]]]) -> Any:
    """A batch of rows as int32 list columns: a twentieth of what Python lists of ints take."""
    import pyarrow as pa

    def int32(values: np.ndarray) -> Any:  # `pa.array` would import pandas, to ask whether they are a series of its own
        return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])

    lists = []
    for column in columns.values():
        offsets = int32(np.cumsum([0, *map(len, column)], dtype=np.int32))
        values = np.concatenate([np.asarray(one, dtype=np.int32) for one in column])
        lists.append(pa.ListArray.from_arrays(offsets, int32(values)))
    return pa.RecordBatch.from_arrays(lists, names=list(columns))
