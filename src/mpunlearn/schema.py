"""Parses JSON into type-checked dataclasses.

Every JSON file that the package reads back and every network message is described by a frozen dataclass. `parse` builds
an instance from decoded JSON and rejects missing fields, unknown fields and values of the wrong type, so the code that
uses it needs no further checks. `check_options` applies the same checks to dataclasses that Python users construct
directly.

A dataclass with a field `format` is versioned: `read` rejects files of a newer format, and an `upgrade` function
converts the JSON of older formats to the current one. A field that was added later only needs a default. If that
default is not how older versions behaved, `older(value, default)` says what an absent field stands for.

Supported types: str, int, float, bool, Any, Literal, list, tuple[T, ...], dict and Mapping with string keys, unions,
optional types, and nested dataclasses.
"""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mpunlearn.errors import FileError, PlanError, SchemaError
from mpunlearn.files import write_json
from mpunlearn.storage import Place, read_json

MAX_INTEGER = 1 << 53
"""Largest integer that every JSON implementation preserves, including those that read numbers as doubles."""
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
_OLDER, _WHY = "older", "why"
M = TypeVar("M")


def older(absent: Any, default: Any, **options: Any) -> Any:
    """A dataclass field that was added later, whose default is not how older versions behaved.

    Args:
        absent: the field's value in JSON that an older version wrote, which lacks the field.
        default: the default for everything new.
        options: further arguments of `dataclasses.field`.
    """
    return dataclasses.field(default=default, metadata={_OLDER: absent}, **options)


def explained(default: Any, why: str) -> Any:
    """A dataclass field that carries its explanation, for a settings file that is generated from the dataclass.

    Args:
        default: the default value.
        why: what the field is, and why it has this default.
    """
    return dataclasses.field(default=default, metadata={_WHY: why})


def explanation(item: "dataclasses.Field[Any]") -> str:
    """The explanation of a field that was declared with `explained`; empty for any other."""
    return str(item.metadata.get(_WHY, ""))


def parse(kind: type[M], value: Any) -> M:
    """Builds a dataclass from decoded JSON.

    Raises:
        SchemaError: a field is missing, unknown, or of the wrong type.
    """
    if not isinstance(value, Mapping):
        raise SchemaError(f"expected the fields of {kind.__name__}, found {value!r:.60}")
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)  # type: ignore[arg-type]
    if unknown := sorted(set(value) - {item.name for item in fields}):
        raise SchemaError(f"{kind.__name__}: unknown field {unknown[0]!r:.40}")
    given = {}
    for item in fields:
        if item.name in value:
            given[item.name] = typed(hints[item.name], value[item.name], f"{kind.__name__}.{item.name}")
        elif _OLDER in item.metadata:
            given[item.name] = item.metadata[_OLDER]
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise SchemaError(f"{kind.__name__}: missing field {item.name!r}")
    return kind(**given)


def read(kind: type[M], path: Place, upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> M:
    """Reads a dataclass from a JSON file.

    Args:
        kind: the dataclass.
        path: the file.
        upgrade: converts the content of a file of any older format to the current format.

    Raises:
        FileError: the file cannot be read as JSON.
        SchemaError: its content does not match the dataclass, or a newer version wrote it.
    """
    value = read_json(path)
    current = getattr(kind, "format", None)
    if current is not None and isinstance(found := value.get("format"), int) and found > current:
        raise SchemaError(f"{path}: has format {found}, expected at most {current}; upgrade mpunlearn")
    try:
        return parse(kind, upgrade(value))
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None


def write(path: Path, value: Any, mode: int = 0o600) -> None:
    """Writes a dataclass as a JSON file, atomically.

    Raises:
        FileError: the file cannot be written.
    """
    try:
        write_json(path, dataclasses.asdict(value), mode)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror}; fix the cause and run again") from error


def check_options(options: Any) -> None:
    """Checks the field types of a dataclass whose fields are command-line options; call it from `__post_init__`.

    Raises:
        PlanError: a value has the wrong type. The message names the option.
    """
    hints = typing.get_type_hints(type(options))
    for item in dataclasses.fields(options):
        try:
            value = typed(hints[item.name], getattr(options, item.name), f"--{item.name.replace('_', '-')}")
        except SchemaError as error:
            raise PlanError(str(error)) from None
        object.__setattr__(options, item.name, value)


def typed(hint: Any, value: Any, where: str) -> Any:
    """Converts a value to the type `hint`; a `SchemaError` names its location `where`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        options = [option for option in arguments if option is not types.NoneType]
        if value is None and len(options) < len(arguments):
            return None
        if len(options) == 1:
            return typed(options[0], value, where)
        for option in options:
            with suppress(SchemaError):
                return typed(option, value, where)
        raise SchemaError(f"{where}: expected {' or '.join(map(_described, options))}, found {value!r:.60}")
    if origin is list and isinstance(value, list):
        return [typed(arguments[0], item, where) for item in value]
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(typed(arguments[0], item, where) for item in value)
    if origin in (dict, Mapping) and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        prefix = "--" if where.startswith("--") else f"{where}."
        return {key: typed(arguments[1], item, prefix + key.replace("_", "-")) for key, item in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise SchemaError(f"{where}: expected one of {', '.join(map(str, arguments))}, found {value!r:.60}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else parse(hint, value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if abs(int(value)) > MAX_INTEGER:
            raise SchemaError(f"{where}: expected an integer of at most {MAX_INTEGER}, found {value!r:.60}")
        return int(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise SchemaError(f"{where}: expected a finite number, found {value!r:.60}")
        return number
    if hint in (str, bool) and type(value) is hint:
        return value
    raise SchemaError(f"{where}: expected {_described(hint)}, found {value!r:.60}")


def _described(hint: Any) -> str:
    """A type in words."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return str(_NAMES.get(hint, hint))
