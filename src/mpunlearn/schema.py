"""JSON in, a checked dataclass out."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from mpunlearn.errors import MessageError

MAX_INTEGER = 1 << 53
"""Whole numbers up to this are the same in every program that reads JSON."""
M = TypeVar("M")


def parse(kind: type[M], value: Mapping[str, Any]) -> M:
    """A dataclass from JSON, every field checked for its type.

    Raises:
        MessageError: a field is missing, unknown, or of another type.
    """
    if not isinstance(value, Mapping):
        raise MessageError(f"expected the fields of a {kind.__name__}, found {type(value).__name__}")
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)  # type: ignore[arg-type]
    if unknown := sorted(set(value) - {item.name for item in fields}):
        raise MessageError(f"{kind.__name__} has no field {unknown[0]!r:.40}")
    given = {}
    for item in fields:
        if item.name in value:
            given[item.name] = _typed(hints[item.name], value[item.name], f"{kind.__name__}.{item.name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise MessageError(f"{kind.__name__}: no field {item.name}")
    return kind(**given)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """A value of a type, or the error that it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in arguments if option is not type(None)]
        return None if value is None and len(options) < len(arguments) else _typed(options[0], value, where)
    if origin is list and isinstance(value, list):
        return [_typed(arguments[0], item, where) for item in value]
    if origin in (dict, Mapping) and isinstance(value, dict):
        return value if arguments[1] is Any else {key: _typed(arguments[1], item, where) for key, item in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise MessageError(f"{where}: expected one of {', '.join(map(str, arguments))}, found {value!r:.60}")
        return value
    if type(value) is int and abs(value) > MAX_INTEGER:
        raise MessageError(f"{where}: expected a number up to {MAX_INTEGER}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse(hint, value)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise MessageError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r:.60}")
    return value
