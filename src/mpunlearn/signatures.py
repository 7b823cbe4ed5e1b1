"""Which options a command has: derived from the signature and docstring of its function.

A parameter of a dataclass type, such as `training: Training | None`, stands for all fields of that dataclass, with the
attribute docstrings of the fields as help texts. The hyperparameters of all objectives are options, too. `options` parses
them.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_overloads

from mpunlearn.presets import NEEDED, PRESETS
from mpunlearn.protocol.objectives import HYPERPARAMETERS, OBJECTIVES
from mpunlearn.protocol.plan import Training

OBJECTIVE_FIELDS = ("objective", "gamma", "alpha", "retain_loss", "skip_tokens")
"""Fields of `Training` that define the objective."""
GROUPS = {
    "Perturbation": "Noise and reparameterization",
    "Federation": "Clients",
    "Training": "Training",
    "Data": "Data",
    "Resources": "Resources of this machine",
}
MAIN, OBJECTIVE, HYPER, GENERAL = "Main options", "Objective", "Hyperparameters of the objectives", "General"
ORDER = (
    MAIN,
    GROUPS["Perturbation"],
    OBJECTIVE,
    GROUPS["Training"],
    GROUPS["Data"],
    GROUPS["Federation"],
    GROUPS["Resources"],
    HYPER,
    GENERAL,
)
REQUIRED = inspect.Parameter.empty
"""Default of an option that is required."""


@dataclass(frozen=True)
class General:
    """Options of every command."""

    config: Path | None = None
    """YAML file that sets any of these options. The command line takes precedence."""
    print_config: bool = False
    """Print the values of all options as YAML, in the format that --config reads, and exit."""
    json: bool = False
    """Print the result as JSON to standard output."""
    quiet: bool = False
    """Show errors and warnings only, no progress."""
    verbose: bool = False
    """Also show what is loaded, on which device, and how long it takes."""


@dataclass(frozen=True)
class Option:
    """One option of a command."""

    name: str
    hint: Any
    default: Any
    """`REQUIRED` if the option has no default."""
    help: str
    group: str
    positional: bool = False

    @property
    def flag(self) -> str:
        """The option as written on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def pairs(self) -> bool:
        """Whether it is given as KEY=VALUE, any number of times."""
        return any(get_origin(member) is Mapping for member in members_of(self.hint))


def options_of(function: Callable[..., Any]) -> list[Option]:
    """All options of a command, in the order of the help text."""
    texts = _parameter_texts(function)
    options: list[Option] = []
    for name, parameter in parameters_of(function).items():
        if kind := dataclass_of(parameter.annotation):
            options += _fields(kind, GROUPS[kind.__name__])
            continue
        positional, default = parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter.default
        if isinstance(default, str) and Path in members_of(parameter.annotation):
            default = Path(default)
        options.append(
            Option(name, _on_command_line(parameter.annotation), default, texts.get(name, ""), MAIN, positional)
        )
    if any(option.name == "objective" for option in options):
        options += [_hyper_parameter(name) for name in HYPERPARAMETERS]
    if any(option.name == "common_noise" for option in options):
        options.append(Option("preset", Literal[*PRESETS] | None, None, _preset_text(), GROUPS["Perturbation"]))
    options += _fields(General, GENERAL)
    return sorted(options, key=lambda option: (ORDER.index(option.group), option.default is not REQUIRED))


def _fields(kind: type[Any], group: str) -> list[Option]:
    """The fields of a dataclass as options."""
    texts = _attribute_texts(kind)
    options = []
    for field in dataclasses.fields(kind):
        if kind is Training and field.name == "parameters":
            continue
        field_group = OBJECTIVE if kind is Training and field.name in OBJECTIVE_FIELDS else group
        hint = inspect.get_annotations(kind, eval_str=True)[field.name]
        options.append(Option(field.name, hint, field.default, texts[field.name], field_group))
    return options


def _preset_text() -> str:
    presets = (
        f"{name} ({', '.join([*(f'{key} {value}' for key, value in values.items()), *NEEDED.get(name, ())])})"
        for name, values in PRESETS.items()
    )
    return f"Named values of several options, each of which can still be given: {', '.join(presets)}.".replace("_", "-")


def _hyper_parameter(name: str) -> Option:
    kind, text = HYPERPARAMETERS[name]
    users = {objective: entry.parameters[name] for objective, entry in OBJECTIVES.items() if name in entry.parameters}
    defaults = ", ".join(f"{objective} {value:g}" for objective, value in users.items())
    return Option(name, kind | None, None, f"{text} Default: {defaults}.", HYPER)


def members_of(hint: Any) -> list[Any]:
    """The types in an annotation, without None."""
    members = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    return [member for member in members if member is not NoneType]


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that are options: those of the first overload, without any that take only Python objects."""
    overloads = get_overloads(function) or [function]
    parameters = inspect.signature(overloads[0], eval_str=True).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if any(member is not Any and get_origin(member) is not Callable for member in members_of(parameter.annotation))
    }


def _on_command_line(annotation: Any) -> Any:
    """The type of an option: a text, without the mappings that Python programs can give instead."""
    members = members_of(annotation)
    return (
        str if len(members) == 2 and str in members and any(get_origin(m) is Mapping for m in members) else annotation
    )


def dataclass_of(annotation: Any) -> type[Any] | None:
    """The dataclass in an annotation such as `Training | None`."""
    for candidate in (annotation, *get_args(annotation)):
        if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
            return candidate
    return None


def summary_of(function: Callable[..., Any]) -> str:
    """The part of a docstring before its sections."""
    text = inspect.getdoc(function) or ""
    return re.split(r"\n\n(?:Args|Example|Returns|Raises):", text)[0].replace("`", "")


def _parameter_texts(function: Callable[..., Any]) -> dict[str, str]:
    """The parameter descriptions in the Args section of a docstring."""
    from docstring_parser import parse as parse_docstring

    docstring = parse_docstring(inspect.getdoc(function) or "")
    return {param.arg_name: _plain(param.description or "") for param in docstring.params}


def _attribute_texts(kind: type[Any]) -> dict[str, str]:
    """The attribute docstrings of the fields of a dataclass."""
    from docstring_parser import parse_from_object

    return {param.arg_name: _plain(param.description or "") for param in parse_from_object(kind).params}


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("`", "")
