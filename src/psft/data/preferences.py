"""From a source of preference data to tokenised pairs: one prompt, the chosen and the rejected answer.

Lifecycle of a row: read (`sources`) -> recognised (`formats`) -> checked (`pairs`) -> rendered and tokenised
(`render`, as demonstrations are) -> cut at `max_length` -> stored, or rejected with a reason at any of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from psft.config import TRUNCATIONS
from psft.data.encode import BatchEncoder, EncodedBatch, int32_lists
from psft.data.formats import PAIR_FORMATS, Format, choose_format
from psft.data.pairs import TEXTS, to_pair
from psft.data.prepare import Kind, Prepared, prepare_source, visible
from psft.data.render import Encoded, Rendered, decode
from psft.data.rows import Rejection, Row, RowRejected
from psft.errors import RequestError
from psft.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenPair(NamedTuple):
    """Token ids; both answers follow the same prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def prepare_preferences(
    source: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation: str = "keep_start",
    split: str = "train",
    config_name: str | None = None,
    dataset_format: str = "auto",
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    on_bad_row: str = "error",
    rejected_path: Path | None = None,
    max_rows: int | None = None,
    description: str = "preferences",
    num_processes: int | None = None,
    cache_dir: Path | None = None,
) -> Prepared:
    """Read, check, render and tokenise pairs. Columns of the table: prompt_ids, chosen_ids, rejected_ids.

    Args:
        max_length: most tokens of prompt and answer together; None keeps all.
        truncation: what is cut off beyond it, see `cut_pair`.
        others: as `psft.data.prepare_dataset`.
    Raises:
        RequestError: the source cannot be read, its format is unknown, rows are bad and `on_bad_row` is "error", or
            no row is left.
    """
    if truncation not in TRUNCATIONS:
        raise RequestError(f"truncation={truncation} must be one of {', '.join(TRUNCATIONS)}.")
    return prepare_source(
        source, PAIRS, tokenizer=tokenizer, max_length=max_length, split=split, config_name=config_name,
        dataset_format=dataset_format, columns=columns, system_prompt=system_prompt, on_bad_row=on_bad_row,
        rejected_path=rejected_path, max_rows=max_rows, description=description, num_processes=num_processes,
        cache_dir=cache_dir, truncation=truncation,
    )  # fmt: skip


def cut_pair(pair: TokenPair, max_length: int | None, truncation: str) -> TokenPair:
    """At most `max_length` tokens of prompt and answer.

    keep_start: the end of a sequence is cut off, of each answer by itself; the prompt stays whole unless it alone is
        longer. TRL's rule.
    llama_factory: the longer answer decides for both. An answer under half of max_length stays whole and the END of the
        prompt is cut off; a prompt under half of it stays whole and the answers are cut; else both are cut in
        proportion. LLaMA-Factory's rule (`infer_seqlen`), with which the paper's DPO was run: a cut prompt loses the
        question's end and the template's opening of the answer.
    """
    prompt, chosen, rejected = pair
    if max_length is None or pair.length <= max_length:
        return pair
    if truncation == "keep_start":
        room = max(max_length - len(prompt), 0)
        return TokenPair(prompt[:max_length], chosen[:room], rejected[:room])
    longest = max(len(chosen), len(rejected))
    if 2 * longest < max_length:
        most = max_length
    elif 2 * len(prompt) < max_length:
        most = max_length - len(prompt)
    else:
        most = int(max_length * (longest / (len(prompt) + longest)))
    kept = min(most, longest)
    return TokenPair(prompt[: max(max_length - kept, 0)], chosen[:kept], rejected[:kept])


def render_pair(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> str:
    """One pair as text: a line saying how to read it, the prompt, then both answers between ⟦ and ⟧."""
    row = prepared.table.slice(index, 1).to_pylist()[0]
    prompt, chosen, rejected = (row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    texts = [visible(decode(tokenizer, ids)) for ids in (prompt, chosen, rejected)]
    return (
        f"example {index}: {len(prompt)} tokens of prompt, {len(chosen)} chosen, {len(rejected)} rejected (answers "
        f"between ⟦ and ⟧), end token {prepared.report.end_token}\n{texts[0]}\n"
        f"chosen   ⟦{texts[1]}⟧\nrejected ⟦{texts[2]}⟧"
    )


class PairEncoder(BatchEncoder):
    """Pairs: columns `prompt_ids`, `chosen_ids`, `rejected_ids`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: Format, *, truncation: str, **options: Any) -> None:
        # Whole texts are the person's own rendering: no chat template
        super().__init__(tokenizer, format, rendered_as="text" if format.name == TEXTS.name else None, **options)
        self._truncation = truncation

    def __call__(self, batch: list[Row]) -> EncodedBatch:
        rendered = [self._guarded(row, self._sides) for row in batch]
        sides = [side for item in rendered if not isinstance(item, RowRejected) for side in item]
        encoded = iter(self._encoder.encode(sides))
        result = EncodedBatch(len(batch))
        kept: list[TokenPair] = []
        for row, item in zip(batch, rendered, strict=True):
            if isinstance(item, RowRejected):
                result.rejections.append(Rejection.of(row, item))
                continue
            try:
                whole = _token_pair(next(encoded), next(encoded))
                pair = cut_pair(whole, self._max_length, self._truncation)
                _check_cut(pair, whole, self._max_length)
            except RowRejected as rejected:
                result.num_too_long += rejected.reason.startswith(_NO_ANSWER)
                result.rejections.append(Rejection.of(row, rejected))
                continue
            quotes = {**item[0].quotes, **item[1].quotes}
            if quotes:
                result.num_with_special_text += 1
                result.first_special_text = result.first_special_text or f"{min(quotes.values())!r} in {row.where}"
            result.num_truncated += pair != whole
            result.num_trained_tokens += len(pair.chosen) + len(pair.rejected)
            kept.append(pair)
        if kept:
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            result.rows = int32_lists(dict(zip(names, zip(*kept, strict=True), strict=True)))
        return result

    def _sides(self, row: Row) -> tuple[Rendered, Rendered]:
        pair = to_pair(row, self._format, columns=self._columns, system_prompt=self._system_prompt)
        for side in (pair.chosen, pair.rejected):
            self._encoder.require_kept(side)
        return self._renderer.pieces(pair.chosen), self._renderer.pieces(pair.rejected)


def _recognise(values: Iterable[Any], *, columns: Mapping[str, str] | None, **named: Any) -> Format:
    """The format of a source; `TEXTS` where chosen and rejected without a prompt hold texts, not conversations."""
    values = list(values)
    format = choose_format(values, columns=columns, formats=PAIR_FORMATS, **named)
    if format.name != "chosen-rejected":
        return format
    column = (columns or {}).get("chosen", "chosen")
    found = (value.get(column) for value in values if isinstance(value, Mapping))
    first = next((value for value in found if value is not None), None)
    is_json = isinstance(first, str) and first.lstrip().startswith("[")  # messages in a CSV cell
    return TEXTS if isinstance(first, str) and not is_json else format


PAIRS = Kind("pairs", _recognise, PairEncoder)
_NO_ANSWER = "no answer token within"


def _token_pair(*sides: Encoded | RowRejected) -> TokenPair:
    """Prompt and both answers; what a template writes after the end token is left out, as nothing follows it."""
    parts: list[tuple[list[int], list[int]]] = []
    for side in sides:
        if isinstance(side, RowRejected):
            raise side
        ids, labels = side
        trained = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        if not trained or not trained[0]:
            raise RowRejected("no token to train" if not trained else "no prompt before the answer")
        parts.append((ids[: trained[0]], ids[trained[0] : trained[-1] + 1]))
    (prompt, chosen), (other, rejected) = parts
    if prompt != other:
        raise RowRejected("the prompt has other tokens before the one answer than before the other")
    return TokenPair(prompt, chosen, rejected)


def _check_cut(pair: TokenPair, whole: TokenPair, max_length: int | None) -> None:
    if not pair.prompt or not pair.chosen or not pair.rejected:
        raise RowRejected(f"{_NO_ANSWER} max_length={max_length}", f"{whole.length} tokens")
    if pair.chosen == pair.rejected:
        raise RowRejected(f"chosen and rejected are the same within max_length={max_length}")


def pair_lengths(table: Any) -> list[int]:
    """Padded tokens that each pair takes in a batch by itself: both sequences, each as long as the longer.

    Args:
        table: an Arrow table, or a data set of `datasets`, with the columns of `prepare_preferences`.
    """
    import pyarrow.compute as pc

    if hasattr(table, "with_format"):
        table = table.with_format("arrow")[:]
    prompt, chosen, rejected = (
        pc.list_value_length(table[name]).to_pylist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return [2 * (p + max(c, r)) for p, c, r in zip(prompt, chosen, rejected, strict=True)]
