"""Prompts for reinforcement learning: rows with a prompt and what the rewards need, read, checked, each used once.

    a row                                                        becomes
    prompt (text or messages), or question / problem / messages  prompt: messages, a system prompt before them if given
    gold, or answer / solution / reward_model.ground_truth       gold; of a GSM8K solution the number after ####
    everything else                                              as it is, for the rewards
    reasoning-gym:TASK?...                                       the task's question; gym_source and gym_index

A prompt that comes again is left out: DAPO-Math-17k has 1.79 million rows and 17 thousand prompts. One longer than
`max_prompt_length` tokens is left out. Both are counted. A row that cannot be used is a row of rejected.jsonl.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psft.data.demonstrations import final_answer
from psft.data.gym import PREFIX, open_gym_task
from psft.data.rows import Rejection, Row, RowRejected
from psft.data.sources import read_rows
from psft.data.tally import check_on_bad_row, refuse_bad_rows, write_rejections
from psft.data.templates import render_chat
from psft.errors import RequestError, shown

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ROW_FIELD = "psft_row"
"""The column that holds a row's other fields as JSON: those of rows may differ in kind, which a table cannot hold."""
PROMPT_FIELDS = ("prompt", "messages", "question", "problem")
GOLD_FIELDS = ("gold", "answer", "solution")
"""Where a row may have its prompt, and its right answer; the first that is there counts."""
_TOO_LONG = "the prompt is longer than max_prompt_length"
_ROLES = ("system", "user", "assistant")

Messages = list[dict[str, str]]


@dataclass
class PromptReport:
    """What `prepare_prompts` found. Counts are rows, lengths tokens."""

    source: str
    num_rows: int = 0
    num_used: int = 0
    num_duplicates: int = 0
    num_conflicting: int = 0
    """Copies of a prompt whose gold answer is another than the first one's."""
    num_too_long: int = 0
    num_rejected: int = 0
    longest: int = 0
    """Of the prompts used."""
    reasons: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def line(self) -> str:
        """All of it for a person."""
        notes = {
            "copies left out": self.num_duplicates,
            "of them with another answer": self.num_conflicting,
            "too long": self.num_too_long,
            "rejected": self.num_rejected,
        }
        said = "".join(f", {count:,} {what}" for what, count in notes.items() if count)
        return f"{self.num_used:,} prompts of {self.source}, the longest of {self.longest:,} tokens{said}"


@dataclass(frozen=True)
class PreparedPrompts:
    """rows: {"prompt": messages, "psft_row": the other fields as JSON}."""

    rows: list[dict[str, Any]]
    report: PromptReport
    rejections: list[Rejection]

    @property
    def dataset(self) -> datasets.Dataset:
        import datasets

        return datasets.Dataset.from_list(self.rows)


def fields_of(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row of a data set: those of `psft_row`, where it has one, and its columns."""
    fields = {name: value for name, value in columns.items() if name not in ("prompt", ROW_FIELD)}
    return fields if ROW_FIELD not in columns else {**json.loads(columns[ROW_FIELD]), **fields}


def prepare_prompts(
    source: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    check: Callable[[Mapping[str, Any], Messages], None] | None = None,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    on_bad_row: str = "error",
    max_rows: int | None = None,
    keeps_duplicates: bool = False,
    rejected_path: Path | None = None,
) -> PreparedPrompts:
    """Read and check the prompts of `source`.

    Args:
        check: (fields, messages) -> raises RequestError if a reward lacks something.
        columns: role -> field: prompt, gold, or any name a reward wants.
        on_bad_row: "error" stops and lists the first ten bad rows; "skip" leaves them out.
        rejected_path: where rows that are not used are written, copies apart; nothing is written if there is none.
    Raises:
        RequestError: the source cannot be read, rows are bad and `on_bad_row` is "error", or no prompt is left.
    """
    check_on_bad_row(on_bad_row)
    report, rejections = PromptReport(shown(source)), []
    reasons: Counter[str] = Counter()
    gold_of: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for row in _read(source, split, config_name, max_rows):
        report.num_rows += 1
        try:
            messages, fields = _understood(row, columns or {}, system_prompt)
            key = json.dumps(messages, ensure_ascii=False)
            if not keeps_duplicates and key in gold_of:
                report.num_duplicates += 1
                report.num_conflicting += gold_of[key] != fields.get("gold")
                continue
            if check is not None:
                _checked(check, fields, messages)
            length = _num_tokens(tokenizer, messages)
            gold_of[key] = fields.get("gold")
            if max_prompt_length is not None and length > max_prompt_length:
                report.num_too_long += 1
                raise RowRejected(f"{_TOO_LONG}={max_prompt_length}", f"{length} tokens")
        except RowRejected as error:
            rejections.append(Rejection.of(row, error))
            reasons[error.reason] += 1
            continue
        report.longest = max(report.longest, length)
        rows.append({"prompt": messages, ROW_FIELD: json.dumps(fields, ensure_ascii=False, default=str)})
    report.num_used = len(rows)
    report.num_rejected = len(rejections) - report.num_too_long
    report.reasons = dict(reasons)
    if rejected_path is not None and rejections:
        write_rejections(rejected_path, rejections)
    _stop_on_bad_rows(report, rejections, on_bad_row)
    return PreparedPrompts(rows, report, rejections)


def _read(source: str, split: str, config_name: str | None, max_rows: int | None) -> Iterator[Row]:
    if not source.startswith(PREFIX):
        return read_rows(source, split=split, config_name=config_name, max_rows=max_rows)
    task = open_gym_task(source)
    size = len(task) if max_rows is None else min(len(task), max_rows)
    return (
        Row(source, i + 1, {"prompt": task[i]["question"], "gym_source": source, "gym_index": i}) for i in range(size)
    )


def _understood(row: Row, columns: Mapping[str, str], system_prompt: str | None) -> tuple[Messages, dict[str, Any]]:
    """The messages of a row, and its other fields."""
    if row.problem is not None:
        raise RowRejected(row.problem, row.detail)
    if not isinstance(row.value, Mapping):
        raise RowRejected("not an object with fields", f"a {type(row.value).__name__}")
    fields = dict(row.value)
    for role, name in columns.items():
        if name not in fields:
            raise RowRejected(f"the column {name} of columns is missing", f"for {role}")
        fields[role] = fields.pop(name) if role != name else fields[name]
    found = next((field for field in PROMPT_FIELDS if fields.get(field) is not None), None)
    if found is None:
        raise RowRejected("no prompt", f"one of the fields {', '.join(PROMPT_FIELDS)}; or columns=prompt=FIELD")
    messages = _messages(fields.pop(found), found)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    gold = _gold(fields)
    return messages, fields if gold is None else {**fields, "gold": gold}


def _messages(value: Any, name: str) -> Messages:
    if isinstance(value, str):
        if not value.strip():
            raise RowRejected(f"'{name}' is empty")
        return [{"role": "user", "content": value}]
    if not isinstance(value, Iterable) or not (messages := list(value)):
        raise RowRejected(f"'{name}' is neither a text nor a list of messages")
    made = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if role not in _ROLES or not isinstance(content, str):
            raise RowRejected("a message has no role or no text", f"message {number} of '{name}'")
        made.append({"role": str(role), "content": content})
    while made and made[-1]["role"] == "assistant":  # a conversation to be answered: its last answer is not shown
        made.pop()
    if not made or made[-1]["role"] != "user":
        raise RowRejected("the prompt does not end with a user's turn", f"'{name}'")
    return made


def _gold(fields: dict[str, Any]) -> Any:
    """The right answer, where the row has one under a name of its own."""
    name = next((name for name in GOLD_FIELDS if fields.get(name) is not None), None)
    if name is None:
        model = fields.get("reward_model")
        return model.get("ground_truth") if isinstance(model, Mapping) else None
    value = fields[name]
    if name != "gold" and isinstance(value, str) and "####" in value:
        return final_answer(value) or value
    return value


def _checked(
    check: Callable[[Mapping[str, Any], Messages], None], fields: Mapping[str, Any], messages: Messages
) -> None:
    try:
        check(fields, messages)
    except RequestError as error:
        raise RowRejected(str(error).rstrip(".")) from error


def _num_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> int:
    text = render_chat(tokenizer, messages, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _stop_on_bad_rows(report: PromptReport, rejections: list[Rejection], on_bad_row: str) -> None:
    """Raise RequestError if bad rows are to stop the run, or no prompt is left. A prompt too long is no bad row."""
    if not report.num_used and report.num_too_long == report.num_rows - report.num_duplicates:
        raise RequestError(
            f"{report.source}: every prompt is longer than max_prompt_length. Raise --max_prompt_length."
        )
    bad = [rejection for rejection in rejections if not rejection.reason.startswith(_TOO_LONG)]
    refuse_bad_rows(report.source, bad, report.num_rows, on_bad_row, is_any_left=report.num_used > 0)
