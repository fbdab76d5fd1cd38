"""Recognises what kind of demonstrations a source holds from the names of its fields.

Formats, most explicit first; the first one whose required fields are all present wins. `columns` maps a role to the
field that plays it, and a format that uses the mapped roles goes before one that does not.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psft.errors import RequestError, shown

_SHOWN_FIELDS = 30


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of row: `required` fields decide whether it is recognised, `optional` ones are used where present."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS = (
    Format("messages", ("messages",)),  # OpenAI chat: [{"role": ..., "content": ...}]
    Format("conversations", ("conversations",), ("system",)),  # ShareGPT: [{"from": "human", "value": ...}]
    Format("prompt-completion", ("prompt", "completion"), ("system",)),  # TRL: text or messages
    Format("prompt-demonstration", ("prompt", "demonstration"), ("system",)),  # parquet of the reference PSFT fork
    Format("instruction", ("instruction", "output"), ("input", "system")),  # Alpaca
    Format("question-answer", ("question", "answer"), ("system",)),  # GSM8K
    Format("text", ("text",)),  # the person's own rendered text, every token trained; special tokens in it are meant
)
PAIR_FORMATS = (
    Format(
        "prompt-chosen-rejected", ("prompt", "chosen", "rejected"), ("system",)
    ),  # TRL, UltraFeedback: text or messages
    Format("chosen-rejected", ("chosen", "rejected"), ("system",)),  # two conversations, or two texts, that begin alike
)
"""Of preference data: two answers to one prompt, of which `chosen` is the better."""


def known_formats(formats: Sequence[Format] = FORMATS) -> str:
    return "; ".join(f"{f.name} ({' + '.join(f.required)})" for f in formats)


def choose_format(
    values: Iterable[Any],
    *,
    dataset_format: str = "auto",
    columns: Mapping[str, str] | None = None,
    source: str,
    formats: Sequence[Format] = FORMATS,
) -> Format:
    """The format of a source, from its first rows (`values`; anything but an object with fields is passed over).

    Args:
        formats: those it may have.
    Raises:
        RequestError: unknown format or role, a mapped column that no row has, or fields that fit no format.
    """
    columns = columns or {}
    by_name = {format.name: format for format in formats}
    roles = tuple(dict.fromkeys(role for format in formats for role in (*format.required, *format.optional)))
    for role in columns:
        if role not in roles:
            raise RequestError(f"columns: unknown role {role!r}{_nearest(role, roles)}. Roles: {', '.join(roles)}.")
    if dataset_format != "auto" and dataset_format not in by_name:
        raise RequestError(
            f"dataset_format: unknown format {dataset_format!r}{_nearest(dataset_format, by_name)}. "
            f"Formats: auto; {known_formats(formats)}."
        )
    field_sets = list(dict.fromkeys(tuple(value) for value in values if isinstance(value, Mapping) and value))
    if not field_sets:  # nothing but unreadable rows: validation will list them under any format
        return by_name.get(dataset_format, formats[0])
    source = shown(source)
    more = ", ..." if len(field_sets[0]) > _SHOWN_FIELDS else ""
    seen = ", ".join(shown(name, 40) for name in field_sets[0][:_SHOWN_FIELDS]) + more
    for role, column in columns.items():
        if not any(column in fields for fields in field_sets):
            raise RequestError(
                f"columns: {source} has no field {column!r} for role {role!r}{_nearest(column, field_sets[0])}. "
                f"Its fields: {seen}."
            )
    if dataset_format != "auto":
        return by_name[dataset_format]
    for fields in field_sets:
        if (found := _recognise({*fields, *columns}, columns, formats)) is not None:
            return found
    example = "chosen=FIELD,rejected=FIELD" if "chosen" in roles else "prompt=FIELD,completion=FIELD"
    raise RequestError(
        f"{source}: the fields ({seen}) fit no known format. Known: {known_formats(formats)}. "
        f"Name your fields with columns, for example --columns {example}."
    )


def _recognise(fields: set[str], columns: Mapping[str, str], formats: Sequence[Format]) -> Format | None:
    candidates = [format for format in formats if fields.issuperset(format.required)]
    if not candidates:
        return None
    return max(candidates, key=lambda format: len(columns.keys() & {*format.required, *format.optional}))


def pick_roles(value: Mapping[str, Any], format: Format, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The fields of one row under their role names; a field that is absent is left out."""
    columns = columns or {}
    names = {role: columns.get(role, role) for role in (*format.required, *format.optional)}
    return {role: value[column] for role, column in names.items() if column in value}


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [str(item) for item in known], n=1)
    return f" (did you mean '{shown(close[0], 40)}'?)" if close else ""
