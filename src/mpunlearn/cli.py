"""The command line: one command per library function. It parses options, calls the function, and prints the result.

Options, types and help texts come from the functions' signatures and docstrings (see `options`), so the command line
and the Python API share one text. The modules of the commands import nothing heavy at the top level, so `--help` does
not load PyTorch.

Exit codes: 0 success, 2 invalid input (reported in one line), 3 an audit found more than --require allows or a record does
not verify, 4 `doctor` found that a run cannot start, 130 interrupted with Ctrl-C, 143 terminated. A traceback is a bug.
"""

import difflib
import importlib
import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mpunlearn import __version__
from mpunlearn.errors import DisclosureWarning, MPUError, NothingUnlearnedWarning, ReportedError
from mpunlearn.options import ParseError, parse
from mpunlearn.progress import logger, say
from mpunlearn.storage import StorePath


@dataclass(frozen=True)
class Verb:
    """One command."""

    module: str
    """Module below `mpunlearn` that holds the command's function."""
    group: str
    what: str
    """One-line description for the overview."""
    resume: str = ""
    """What to do after an interruption; {NAME} stands for the value of an option."""

    def function(self, name: str) -> Callable[..., Any]:
        """The library function of the command `name`; it is called like the last word of the name."""
        function: Callable[..., Any] = getattr(
            importlib.import_module(f"mpunlearn.{self.module}"), name.split()[-1].replace("-", "_")
        )
        return function


SERVER, CLIENT, BOTH, TRY = "Server (model owner)", "Client (data owner)", "Either or both", "Demos and examples"
AGAIN = "repeat the same command to resume"
VERBS = {
    "preprocess": Verb("server.preprocess", SERVER, "publish the perturbed copies of the next round"),
    "postprocess": Verb("server.postprocess", SERVER, "aggregate the updates of all copies into a new checkpoint"),
    "calibrate": Verb("calibration", SERVER, "find the common noise that a model can bear"),
    "describe": Verb("server.describe", SERVER, "list what the secret reparameterization of a model would change"),
    "audit": Verb("audit.audit", SERVER, "attack the copies of a round and measure what they disclose of the model"),
    "extract": Verb("audit.extract", SERVER, "measure what a model before and after unlearning tells about the texts"),
    "server start": Verb(
        "server.network.serve",
        SERVER,
        "start a run and serve it to clients over the network",
        "resume with `mpunlearn server resume {run}`",
    ),
    "server resume": Verb("server.network.serve", SERVER, "resume an interrupted run", AGAIN),
    "server status": Verb("server.network.status", SERVER, "show the progress of a run"),
    "unlearn": Verb("client.unlearn", CLIENT, "unlearn on one published copy and write the update"),
    "client audit": Verb(
        "client.audit.audit", CLIENT, "measure what updates would tell the server, before sending them"
    ),
    "client review": Verb("client.network.review", CLIENT, "show what a copy is, and accept its model into the policy"),
    "client key": Verb("client.network.join", CLIENT, "generate the client's keys (once)"),
    "client join": Verb("client.network.join", CLIENT, "connect to a run and process its jobs", AGAIN),
    "client work": Verb("client.network.join", CLIENT, "process jobs that another program fetches", AGAIN),
    "forget": Verb("client.forget", BOTH, "unlearn in one place, without a second party"),
    "run": Verb("local", BOTH, "run all rounds with both parties in one process", AGAIN),
    "evaluate": Verb("evaluation.evaluate", BOTH, "measure what a model still knows and can still do"),
    "record show": Verb("record", BOTH, "show what happened in a run, and the number of its record"),
    "record verify": Verb("record", BOTH, "check signatures, order and all files at hand against the record"),
    "record merge": Verb("record", BOTH, "merge the records of both parties"),
    "record open": Verb("record", BOTH, "prove that texts were in the committed forget set"),
    "record add": Verb("record", BOTH, "sign that a run was evaluated, audited, replicated or withdrawn"),
    "report": Verb("report.report", BOTH, "write the report of a run as HTML pages"),
    "plan": Verb("planning.plan", BOTH, "print what a run would do and need, and write its options to run.yaml"),
    "ask": Verb("evaluation.ask", BOTH, "show how several models answer the same questions, side by side"),
    "push": Verb("hub.push", BOTH, "upload an unlearned model to the Hugging Face Hub, with a model card"),
    "doctor": Verb("doctor.doctor", BOTH, "check whether this machine can start a run, and say what to do if not"),
    "demo": Verb("demo.local", TRY, "unlearn four fictitious authors and compare with retraining"),
    "network-demo": Verb("demo.network", TRY, "the same demo with two processes over a network"),
    "example": Verb("demo.example", TRY, "write a small model and data to experiment with"),
}

PREFIXES = ("server", "client", "record")
"""First words of commands with two words."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"mpunlearn {__version__}")
        return 0
    if arguments[0] in PREFIXES and (len(arguments) < 2 or arguments[1] in ("-h", "--help")):
        print(overview(arguments[0]))
        return 0
    words = 2 if arguments[0] in PREFIXES else 1
    name = " ".join(arguments[:words])
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, 1)
        hint = f"did you mean `mpunlearn {near[0]}`?" if near else "see `mpunlearn --help`"
        print(f"mpunlearn: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    try:
        return _call(name, arguments[words:])
    except KeyboardInterrupt:  # while the options were parsed: nothing has begun yet
        print(f"mpunlearn {name}: interrupted", file=sys.stderr)
        return 130


def overview(first: str = "") -> str:
    """The text of `mpunlearn --help`, or of `mpunlearn FIRST --help` for the commands that start with that word."""
    lines = [f"usage: mpunlearn {first + ' ' if first else ''}COMMAND [--help] ..."]
    for group in (SERVER, CLIENT, BOTH, TRY):
        verbs = {
            name: verb
            for name, verb in VERBS.items()
            if verb.group == group and (not first or name.startswith(first + " "))
        }
        if verbs:
            lines += ["", f"{group}:", *(f"  {name:14s} {verb.what}" for name, verb in verbs.items())]
    return "\n".join([*lines, "", "Run `mpunlearn COMMAND --help` to see the options of a command."])


def _call(name: str, arguments: list[str]) -> int:
    """Parses the options of a command, calls its function, and prints the result; returns the exit code."""
    verb, prog = VERBS[name], f"mpunlearn {name}"
    function = verb.function(name)
    try:
        parsed = parse(prog, function, arguments)
    except (ParseError, MPUError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    if parsed is None:
        return 0
    values, general = parsed
    terminated: list[int] = []

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        terminated.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with _output(prog, logging.ERROR if general.quiet else logging.DEBUG if general.verbose else logging.INFO):
            _print(function(**values), general.json)
    except MPUError as error:
        if isinstance(error, ReportedError) and error.report is not None:
            _print(error.report, general.json)
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        hint = verb.resume.format_map({key: str(value) for key, value in values.items()})
        print(f"{prog}: interrupted" + (f"; {hint}" if hint else ""), file=sys.stderr)
        return 143 if terminated else 130
    except BrokenPipeError:  # the reader of standard output has closed the pipe
        sys.stderr.close()
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _print(result: Any, as_json: bool) -> None:
    """Prints the result of a command, as text or as JSON."""
    if as_json:
        value = result.to_json() if hasattr(result, "to_json") else {"result": str(result)}
        print(json.dumps(value, indent=2, ensure_ascii=False))
    elif isinstance(result, str | Path | StorePath):
        print(result)
    elif hasattr(result, "summary"):
        for line in result.summary().splitlines():
            say(line)
        print(*result.copies, sep="\n")
    elif hasattr(result, "table"):
        print(result.table())
    else:
        print(result.text())


class _Lines(logging.Handler):
    """Prints log lines to standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def _output(prog: str, level: int) -> Iterator[None]:
    """Sends log lines of that level and warnings to standard error immediately while a command runs."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if issubclass(category, DisclosureWarning | NothingUnlearnedWarning):
            print(f"{prog}: warning: {message}", file=sys.stderr, flush=True)
        else:
            print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)

    handlers, propagate, level_before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [_Lines()], False
    logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            for category in (DisclosureWarning, NothingUnlearnedWarning):
                warnings.simplefilter("always", category)
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level_before)


if __name__ == "__main__":
    sys.exit(main())
