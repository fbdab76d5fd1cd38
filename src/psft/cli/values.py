"""Turns what a person typed (a flag's text, a YAML value) into the type a setting declares, or says what it expects."""

from __future__ import annotations

import difflib
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from psft.errors import RequestError, shown
from psft.recipes import parse_value

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 256 else f"<a whole number of {x.bit_length()} bits>"

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[:100])


def show_value(value: Any) -> str:
    """A value as a message shows it, however large or deep it is."""
    return shown(_Short().repr(value), 80)


class BadValue(ValueError):
    """The value does not fit; the message says what is expected."""


def alternatives(hint: Any) -> list[Any]:
    """The members of a union (nested ones flattened), or the type itself; a bare `dict` counts as dict[str, Any]."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [member for argument in typing.get_args(hint) for member in alternatives(argument)]
    return [hint]


def accepts_bool(hint: Any) -> bool:
    """Whether a flag of this type may stand without a value."""
    return bool in alternatives(hint)


def is_list(hint: Any) -> bool:
    """Whether a flag of this type may take several values."""
    return any(_origin(member) in (list, tuple) for member in alternatives(hint))


def is_dict(hint: Any) -> bool:
    """Whether a flag of this type may be given as key=value pairs."""
    return any(_origin(member) is dict for member in alternatives(hint))


def convert(value: Any, hint: Any, *, default: Any = None) -> Any:
    """The value as the type `hint` declares.

    Args:
        value: text of a flag, or whatever YAML read. Text is understood the same from both, so `1e-6`, which YAML 1.1
            reads as text, is a number where a number is expected.
        hint: the resolved annotation of the setting.
        default: the setting's default; where a number may also be the word "auto", no other word is accepted.
    Raises:
        BadValue: it does not fit.
    """
    members = alternatives(hint)
    if Any in members:
        return value
    if value is None or (isinstance(value, str) and _means_none(value, members)):
        if type(None) in members:
            return None
        raise BadValue(f"expected {describe(hint, default)}")
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    if enums:
        return _choice(value, [item.value for enum in enums for item in enum])
    words_only = [str(default)] if default == "auto" and int in members else None
    plain_text = isinstance(value, str) and str in members and not ("," in value or value.lstrip().startswith("["))
    for member in sorted(members, key=_precedence):  # the narrowest first: text fits nearly everything
        if plain_text and _origin(member) in (list, tuple):
            continue  # one tracker is a word, several are a list
        try:
            return _convert_one(value, member, words_only)
        except _NoFit:
            continue
    raise BadValue(f"expected {describe(hint, default)}")


def describe(hint: Any, default: Any = None) -> str:
    """What the type accepts, in words."""
    members = alternatives(hint)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    if enums:
        return "one of " + ", ".join(str(item.value) for enum in enums for item in enum)
    words = []
    for member in sorted(members, key=_precedence):
        if member is str and default == "auto" and int in members:
            words.append("auto")
        elif typing.get_origin(member) is typing.Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(member))))
        elif member in _NAMES:
            words.append(_NAMES[member])
        elif _origin(member) in (list, tuple):
            words.append("a list, as a,b or several values")
        elif _origin(member) is dict:
            words.append("key=value,key=value or JSON")
        elif member is not type(None):
            words.append(f"{getattr(member, '__name__', member)} (Python only)")
    return " or ".join(dict.fromkeys(words)) + (" or null" if type(None) in members else "")


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "any value"}


class _NoFit(Exception):
    pass


def _origin(member: Any) -> Any:
    return typing.get_origin(member) or member


def _precedence(member: Any) -> int:
    if typing.get_origin(member) is typing.Literal:
        return 0
    order = {bool: 1, int: 2, float: 3, dict: 4, list: 5, tuple: 5, str: 6}
    return order.get(_origin(member), 7)


def _means_none(text: str, members: list[Any]) -> bool:
    if type(None) not in members:
        return False
    # "none" is a word of its own where text is accepted: report_to none switches trackers off, None means the default
    words = ("null", "None", "~") if str in members else ("null", "None", "~", "none")
    return text.strip() in words


def _choice(value: Any, choices: list[Any]) -> Any:
    if value is False and "no" in choices:  # YAML 1.1 reads `eval_strategy: no` as false
        return "no"
    if isinstance(value, str):
        for choice in choices:
            if value.strip() == str(choice):
                return choice
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    nearest = f" (did you mean {close[0]}?)" if close else ""
    raise BadValue("expected one of " + ", ".join(map(str, choices)) + nearest)


def _convert_one(value: Any, member: Any, words_only: list[str] | None) -> Any:
    if typing.get_origin(member) is typing.Literal:
        for choice in typing.get_args(member):
            if value == choice and type(value) is type(choice) or str(value).lower() == str(choice).lower():
                return choice
        raise _NoFit
    origin = _origin(member)
    converter = {bool: _to_bool, int: _to_int, float: _to_float}.get(origin)
    if converter is not None:
        return converter(value)
    if origin is str:
        if isinstance(value, str) and (words_only is None or value in words_only):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and words_only is None:
            return _number_text(value)  # `dataset_config: 2024`
        raise _NoFit
    if origin in (list, tuple):
        return _to_list(value, typing.get_args(member))
    if origin is dict:
        return _to_dict(value, typing.get_args(member))
    raise _NoFit


def _number_text(value: int | float) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        raise _NoFit from None


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in TRUE_WORDS + FALSE_WORDS:
        return value.strip().lower() in TRUE_WORDS
    raise _NoFit


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise _NoFit
    if isinstance(value, int):
        return value
    number = _to_float(value)  # 1e3 is a whole number, and YAML 1.1 reads it as text
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    if math.isfinite(number) and number.is_integer():
        return int(number)
    raise _NoFit


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _NoFit
    try:
        number = float(
            value[1:] if isinstance(value, str) and value.startswith(".") and value[1:2].isalpha() else value
        )
    except (ValueError, OverflowError):  # above: YAML's `.inf`, also as a flag; a whole number beyond 1e308
        raise _NoFit from None
    if math.isnan(number):
        raise _NoFit
    return number


def _to_list(value: Any, arguments: tuple[Any, ...]) -> list[Any]:
    item_hint = arguments[0] if arguments else Any
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            value = _json(value)
        elif "," in value:
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif str in alternatives(item_hint) or any(_fits(value, member) for member in alternatives(item_hint)):
            value = [value]
        else:
            raise _NoFit
    elif isinstance(value, (int, float)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise _NoFit
    return [convert(item, item_hint) for item in value]


def _fits(value: Any, hint: Any) -> bool:
    try:
        convert(value, hint)
    except BadValue:
        return False
    return True


def _to_dict(value: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    value_hint = arguments[1] if len(arguments) == 2 else Any
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            value = _json(value)
        else:
            pairs = [part.partition("=") for part in value.split(",") if part.strip()]
            if not pairs or not all(sign and key.strip() for key, sign, _ in pairs):
                raise _NoFit
            texts = {key.strip(): text for key, _, text in pairs}
            if len(texts) < len(pairs):
                raise BadValue("one of its keys is given twice")
            value = {key: _yaml(text) if value_hint is Any else text.strip() for key, text in texts.items()}
    if not isinstance(value, Mapping):
        raise _NoFit
    if not all(isinstance(key, (str, int, float)) for key in value):
        raise _NoFit
    named = {key if isinstance(key, str) else _number_text(key): item for key, item in value.items()}
    if len(named) < len(value):  # 1 and "1"
        raise BadValue("one of its keys is given twice")
    return {key: convert(item, value_hint) for key, item in named.items()}


def _yaml(text: str) -> Any:
    try:
        return parse_value(text)
    except RequestError as error:
        raise BadValue(str(error)) from error


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except BadValue:
        raise
    except ValueError as error:
        raise BadValue(f"this is not valid JSON ({shown(error)})") from error
    except RecursionError as error:
        raise BadValue("this is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise BadValue("one of its keys is given twice")
    return made
