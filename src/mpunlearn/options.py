"""Parses the options of a command (see `signatures`) with cyclopts, and reads and prints them as YAML.

Any option can also be set in a file with `--config FILE.yaml`, and several at once with `--preset` (see `presets`). The
command line takes precedence over the file, and the file over the preset.
"""

import dataclasses
import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, get_args, get_origin

from mpunlearn.errors import SchemaError
from mpunlearn.presets import NEEDED, PRESETS
from mpunlearn.protocol.objectives import HYPERPARAMETERS
from mpunlearn.protocol.plan import Training
from mpunlearn.schema import typed

if TYPE_CHECKING:
    import cyclopts
from mpunlearn.signatures import (
    GENERAL,
    ORDER,
    REQUIRED,
    General,
    Option,
    dataclass_of,
    members_of,
    options_of,
    parameters_of,
    summary_of,
)


class ParseError(Exception):
    """The command line cannot be parsed. The message is one line."""


def parse(prog: str, function: Callable[..., Any], arguments: list[str]) -> tuple[dict[str, Any], General] | None:
    """Parses the command line of a command into the keyword arguments of its function.

    Returns:
        The arguments and the general options, or None if the help text or the configuration was printed instead.

    Raises:
        ParseError: an option is unknown or missing, or has an invalid value.
        PlanError: two values contradict each other.
    """
    import cyclopts

    options = {option.name: option for option in options_of(function)}
    configured = _configured(arguments, options)
    only_print = "--print-config" in arguments
    app = cyclopts.App(name=prog, help=summary_of(function), help_flags=(), version_flags=())
    app.default(_signature(options, configured, optional=only_print))
    if any(argument in ("-h", "--help") for argument in arguments):
        app.help_print([])
        return None
    try:
        _, bound, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
    except cyclopts.CycloptsError as error:
        raise ParseError(_message(error, options, prog)) from None
    bound.apply_defaults()
    given = {
        name: _pairs(options[name], configured.get(name) if value is None else value) if options[name].pairs else value
        for name, value in bound.arguments.items()
    }
    if only_print:
        _print_config(given)
        return None
    return _arguments(function, given), General(
        **{field.name: given[field.name] for field in dataclasses.fields(General)}
    )


def _arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the function, with the fields of each dataclass collected into an instance."""
    arguments: dict[str, Any] = {}
    for name, parameter in parameters_of(function).items():
        kind = dataclass_of(parameter.annotation)
        if kind is None:
            arguments[name] = given[name]
            continue
        values = {field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given}
        if kind is Training:
            values["parameters"] = {name: given[name] for name in HYPERPARAMETERS if given[name] is not None}
        arguments[name] = kind(**values)
    return arguments


def _signature(options: Mapping[str, Option], configured: Mapping[str, Any], optional: bool) -> Callable[..., None]:
    """A function whose parameters are the options, annotated for cyclopts."""
    import cyclopts

    groups = {name: cyclopts.Group.create_ordered(name) for name in ORDER}
    parameters = []
    for option in options.values():
        default = configured.get(option.name, None if optional and option.default is REQUIRED else option.default)
        default = None if option.pairs else default  # a mapping, which `parse` takes from the configuration
        hint, how = _for_cyclopts(option)
        if default is None:  # cyclopts checks defaults, too, once anything has imported pydantic
            hint = Optional[hint]  # noqa: UP045
        how["show_default"] = option.default not in (False, None, REQUIRED, ())
        about = cyclopts.Parameter(help=option.help, group=groups[option.group], **how)
        annotation = Annotated[hint, about]  # type: ignore[valid-type]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if option.positional else inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(option.name, kind, default=default, annotation=annotation))
    parameters.sort(key=lambda parameter: parameter.kind)

    def verb(*_: Any, **__: Any) -> None:
        raise AssertionError("only the signature is used")

    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return verb


def _for_cyclopts(option: Option) -> tuple[Any, dict[str, Any]]:
    """The type of an option, and the arguments of `cyclopts.Parameter` that convert and display it."""
    hint, members = option.hint, members_of(option.hint)
    if Path in members:
        how = {"metavar": "PATH", "negative": (), "converter": lambda _, tokens: _path(tokens[0].value)}
        return (Path | None if option.default is None else Path), how
    if get_origin(hint) is Sequence:
        if get_args(hint) == (str,):
            return list[str], {"metavar": "TEXT", "negative": ()}
        how = {"metavar": "PATH ...", "negative": (), "consume_multiple": not option.positional}
        return list[Path], {**how, "converter": lambda _, tokens: [_path(token.value) for token in tokens]}
    if option.pairs:
        return list[str] | None, {"metavar": "KEY=VALUE", "negative": ()}
    if any(get_origin(member) is tuple for member in members):
        return hint, {"n_tokens": 1, "converter": _numbers, "metavar": "NUMBER,NUMBER,...", "negative": ()}
    if bool in members:
        alias = {"alias": "-v"} if option.name == "verbose" else {}
        return hint, {"negative": (), **alias} if option.group == GENERAL else {}
    if len(members) > 1 and get_origin(members[1]) is Literal:
        return hint, {"metavar": f"NUMBER|{'|'.join(get_args(members[1]))}", "negative": ()}
    metavars = {int: "INTEGER", float: "NUMBER", str: option.name.replace("_", "-").upper()}
    return hint, {"metavar": metavars.get(members[0]), "negative": ()}


def _path(text: str) -> Path | str:
    """A path; a URL stays as it is, since `Path` would merge its slashes."""
    return text if "://" in text else Path(text)


def _numbers(kind: Any, tokens: Sequence[Any]) -> tuple[float, ...]:
    """Parses comma-separated numbers."""
    return tuple(float(number) for number in tokens[0].value.split(","))


def _pairs(option: Option, given: Any) -> Any:
    """A mapping from texts such as date_string=today, in which true, false and numbers are what JSON says.

    Raises:
        ParseError: a text has no equals sign.
    """
    if not isinstance(given, list):
        return given
    values: dict[str, Any] = {}
    for text in map(str, given):
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ParseError(f"{option.flag}: expected KEY=VALUE, such as date_string=today, found {text!r:.60}")
        values[key] = value
        with suppress(ValueError):
            values[key] = found if isinstance(found := json.loads(value), bool | int | float) else value
    return values


def _configured(arguments: list[str], options: Mapping[str, Option]) -> dict[str, Any]:
    """Reads the options in the --config file, and those of the --preset for the rest.

    Raises:
        ParseError: the file cannot be read, or has an unknown option or an invalid value; the preset needs another option.
    """
    path, preset = _value_of("--config", arguments), _value_of("--preset", arguments)
    values = {} if path is None else _read_config(Path(path), options)
    preset = preset or values.pop("preset", None)
    if preset in PRESETS and "preset" in options:  # cyclopts reports any other name
        for name in NEEDED.get(preset, ()):
            if name not in values and _value_of(options[name].flag, arguments) is None:
                raise ParseError(f"--preset {preset}: needs {options[name].flag}: {options[name].help}")
        values = {**{key: value for key, value in PRESETS[preset].items() if key in options}, **values}
    return values


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The value of an option on the command line, before anything else is parsed."""
    found = None
    for number, argument in enumerate(arguments):
        if argument == flag and number + 1 < len(arguments):
            found = arguments[number + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
    return found


def _read_config(path: Path, options: Mapping[str, Option]) -> dict[str, Any]:
    """Reads the options in a YAML file; errors as for `_configured`."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParseError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ParseError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ParseError(f"--config {path}: expected lines such as `rounds: 5`, found {content!r:.60}")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in options:
            near = difflib.get_close_matches(name, options, 1)
            raise ParseError(
                f"--config {path}: unknown option {key!r}" + (f"; did you mean {near[0]}?" if near else "")
            )
        values[name] = _from_yaml(options[name], value, path)
    return values


def _from_yaml(option: Option, value: Any, path: Path) -> Any:
    """Converts a value from a configuration file to the type of the option."""
    members = members_of(option.hint)
    if Path in members and isinstance(value, str):
        return _path(value)
    if get_origin(option.hint) is Sequence and isinstance(value, list):
        return [str(item) if get_args(option.hint) == (str,) else _path(str(item)) for item in value]
    if any(get_origin(member) is tuple for member in members) and isinstance(value, str):
        value = value.split(",")
    try:
        if option.pairs:
            value = _pairs(option, value)
        if float in members and isinstance(value, str):
            with suppress(ValueError):
                value = float(value)  # YAML 1.1 reads 1e-5 as a string
        if isinstance(value, list):
            value = [float(item) for item in value]
        return typed(option.hint, value, option.flag)
    except ParseError as error:
        raise ParseError(f"--config {path}: {error}") from None
    except (SchemaError, ValueError, TypeError) as error:
        raise ParseError(f"--config {path}: {option.flag}: {error}") from None


def _print_config(given: Mapping[str, Any]) -> None:
    """Prints the options as YAML, without those that have no value."""
    import yaml

    left_out = {*(field.name for field in dataclasses.fields(General)), "preset"}  # a preset is resolved by now
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or value == () or name in left_out:
            continue
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple | list):
            value = [str(item) if isinstance(item, Path) else item for item in value]
        values[name] = value
    yaml.safe_dump(values, sys.stdout, sort_keys=False, allow_unicode=True)


def _message(error: "cyclopts.CycloptsError", options: Mapping[str, Option], prog: str) -> str:
    """Turns an error of cyclopts into one line that says what is wrong and where to find help."""
    import cyclopts

    see = f"see `{prog} --help`"
    if isinstance(error, cyclopts.MissingArgumentError):
        name = re.search(r"--[\w-]+", str(error))
        option = options.get(name[0][2:].replace("-", "_")) if name else None
        what = option.name.upper() if option is not None and option.positional else (name[0] if name else "an option")
        return f"{what} is missing or has no value; {see}"
    if isinstance(error, cyclopts.UnusedCliTokensError):
        tokens = re.findall(r"'([^']*)'", str(error))
        if tokens and tokens[0] in ("true", "false"):
            return f"unexpected {tokens[0]!r}: flags take no value, use --NAME or --no-NAME; {see}"
        return f"unexpected {', '.join(map(repr, tokens))}; {see}"
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text[0].lower()}{text[1:]}" + ("" if text.endswith("?") else f"; {see}")
