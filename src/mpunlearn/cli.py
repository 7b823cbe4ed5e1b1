"""The command line: one verb per library function; parses, validates, calls.

Arguments, types and help come from the functions' signatures and docstrings, so there is one text for both interfaces. The
options of `Perturbation`, `Training`, `Data` and `Resources` stand beside a function's own, and so do the objectives'
hyper-parameters. `--config FILE.yaml` gives any of them from a file. Bad input is one sentence on standard error and exit
code 2; a traceback is a bug.
"""

import dataclasses
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse._core import ArgumentGroup

from mpunlearn.errors import DisclosureWarning, MPUError
from mpunlearn.protocol.plan import Training

COMMANDS = {
    "preprocess": ("mpunlearn.server", "server: publish the noisy, reparameterized copies of the next round"),
    "unlearn": ("mpunlearn.client", "client: unlearn on one published copy and write the update"),
    "postprocess": ("mpunlearn.server", "server: aggregate the updates of all copies into a new checkpoint"),
    "run": ("mpunlearn.local", "both parties in one process: all rounds, resumable"),
    "server start": ("mpunlearn.server.network.serve", "server: a run with clients on other machines"),
    "server resume": ("mpunlearn.server.network.serve", "server: go on with an interrupted run"),
    "server status": ("mpunlearn.server.network.status", "server: how far a run is"),
    "client key": ("mpunlearn.client.network.join", "client: make keys, once"),
    "client join": ("mpunlearn.client.network.join", "client: connect to a run, and do its jobs"),
    "client work": ("mpunlearn.client.network.join", "client: do the jobs that another program fetches"),
    "describe": (
        "mpunlearn.server",
        "server: what a change of basis would do to a checkpoint, and how much choice it has",
    ),
    "evaluate": ("mpunlearn.evaluation", "what a model still knows, and what it can still do"),
    "demo": ("mpunlearn.demo.local", "unlearn four fictitious authors and compare with retraining"),
    "network-demo": ("mpunlearn.demo.network", "the same between two processes over a network"),
    "example": ("mpunlearn.demo.example", "write a small model and text to try things with"),
}
"""Verb → the module whose function of that name (its last word) does it, and a line for the overview."""


class _Dashes:
    """Options are written with dashes, `--learning-rate`, whatever the parameter is called."""

    def add_argument(self, *args: str, **kwargs: Any) -> Any:
        dashed = [arg.replace("_", "-") if arg.startswith("--") else arg for arg in args]
        return super().add_argument(*dashed, **kwargs)  # type: ignore[misc]


class _Group(_Dashes, ArgumentGroup):
    pass


class _Parser(_Dashes, ArgumentParser):
    _group_class = _Group


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 done, 2 bad input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    words = 2 if arguments[0] in ("server", "client") else 1
    verb = " ".join(arguments[:words])
    if verb == "--version":
        from importlib.metadata import version

        print(f"mpunlearn {version('mpunlearn')}")
        return 0
    if verb not in COMMANDS:
        print(f"mpunlearn: no command {verb!r}\n\n{overview()}", file=sys.stderr)
        return 2
    function = getattr(importlib.import_module(COMMANDS[verb][0]), verb.split()[-1].replace("-", "_"))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DisclosureWarning)
            result = function(**parse(verb, function, arguments[words:]))
    except MPUError as error:
        print(f"mpunlearn {verb}: {error}", file=sys.stderr)
        return 2
    for warning in caught:
        if issubclass(warning.category, DisclosureWarning):
            print(f"mpunlearn {verb}: warning: {warning.message}", file=sys.stderr)
    if isinstance(result, str | Path):
        print(result)
    elif verb == "evaluate":
        print(result.table())
    elif verb == "preprocess":
        print(result.summary(), file=sys.stderr)
        print(*result.copies, sep="\n")
    return 0


def overview() -> str:
    """What `mpunlearn --help` prints."""
    lines = [f"  {verb:14s} {what}" for verb, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: mpunlearn COMMAND [--help] …", "", *lines])


def parse(verb: str, function: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    """The keyword arguments of a verb's function from its command line."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=f"mpunlearn {verb}", description=(inspect.getdoc(function) or "").split("\n")[0])
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    parameters = inspect.signature(function, eval_str=True).parameters
    option_groups = {name: group for name in parameters if (group := _dataclass_of(parameters[name].annotation))}
    lists = {name for name, parameter in parameters.items() if "Sequence" in str(parameter.annotation)}
    for name in lists:
        parser.add_argument(name, nargs="+", help=f"the {name}, one directory per copy, in any order")
    parser.add_function_arguments(function, as_positional=True, skip={*option_groups, *lists})
    for group in option_groups.values():
        parser.add_class_arguments(group, None, skip={"alphas", "weights", "parameters"})
        names = {field.name for field in dataclasses.fields(group)}
        if "alphas" in names:
            parser.add_argument("--alphas", type=_numbers, help="secret scales of the copies' noise, such as 1,1.5,2")
        if "weights" in names:
            parser.add_argument("--weights", type=_numbers, help="weights of the clients' updates, such as 1,2")
    hyper = _hyper_parameters() if any(issubclass(group, Training) for group in option_groups.values()) else {}
    for name, users in hyper.items():
        what = ", ".join(f"{objective} {value:g}" for objective, value in users.items())
        parser.add_argument(f"--{name}", type=float, help=f"hyper-parameter, by default: {what}")
    given = parser.instantiate(parser.parse_args(arguments)).as_dict()
    result: dict[str, Any] = {name: given[name] for name in parameters if name not in option_groups}
    for name, group in option_groups.items():
        values = {field.name: given[field.name] for field in dataclasses.fields(group) if field.name in given}
        if issubclass(group, Training):
            values["parameters"] = {name: given[name] for name in hyper if given[name] is not None}
        result[name] = group(**values)
    return result


def _hyper_parameters() -> dict[str, dict[str, float]]:
    """Every hyper-parameter of an objective, with its default for each objective that has it."""
    from mpunlearn.client.objectives import OBJECTIVES

    found: dict[str, dict[str, float]] = {}
    for objective, entry in OBJECTIVES.items():
        for name, value in entry.parameters.items():
            found.setdefault(name, {})[objective] = value
    return found


def _dataclass_of(annotation: Any) -> type[Any] | None:
    """The dataclass in an annotation `Options | None`."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
            return candidate
    return None


def _numbers(value: str | Sequence[float]) -> tuple[float, ...]:
    """Numbers separated by commas; the parser also passes through what it has parsed before."""
    return tuple(float(number) for number in (value.split(",") if isinstance(value, str) else value))


if __name__ == "__main__":
    sys.exit(main())
