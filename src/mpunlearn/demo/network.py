"""The network demo: runs the README's two commands in two processes, and measures the result.

Both parties run on this machine and communicate over Flower on the loopback address. The server's and the client's
folders share nothing; the two only know the same address. There is no TLS, since nobody else can reach that address;
docs/network.md describes a production setup.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import FileError, NetworkError
from mpunlearn.extras import needs
from mpunlearn.files import as_path
from mpunlearn.progress import say
from mpunlearn.report.data import ORIGINAL, RETRAINED, THIS_RUN

if TYPE_CHECKING:
    from mpunlearn.demo.table import Line

TIMEOUT_SECONDS = 600.0
"""The demo gives up after this long."""


@dataclass(frozen=True)
class NetworkDemoResult:
    """What the network demo measured."""

    models: "list[Line]"
    seconds: dict[str, float]
    final: str
    """The unlearned checkpoint."""
    out: str
    pages: dict[str, str]
    """Party → its page of the report."""

    def text(self) -> str:
        """The table, and where the results and the report are."""
        from mpunlearn.demo.table import table

        end = (
            f"Took {self.seconds['all']:.0f} s. The parties' folders are {self.out}/server and {self.out}/client\n"
            f"The report: {' and '.join(self.pages.values())}"
        )
        return f"{table(self.models)}\n{end}"

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)


def network_demo(*, out: str | Path = "mpu-network-demo", seed: int = 0) -> NetworkDemoResult:
    """Unlearns between two processes over Flower on this machine, and compares the result with retraining.

    Args:
        out: A new directory for both parties' folders and the report.
        seed: Seed for the fictitious data and the models.

    Returns:
        What was measured.

    Raises:
        FileError: `out` exists or cannot be written.
        NetworkError: A process failed or took too long.
    """
    needs("client", "network-demo")
    needs("network", "network-demo")
    from mpunlearn.demo.example import example
    from mpunlearn.demo.models import trained_world
    from mpunlearn.demo.reporting import write_answers, write_metrics
    from mpunlearn.demo.table import line_of, metrics_of, sets_of
    from mpunlearn.protocol.flower.programs import free_port
    from mpunlearn.report.report import report

    folder, begin = as_path(out, "--out"), time.monotonic()
    if folder.exists():
        raise FileError(f"{folder}: already exists; choose another --out, or remove this one")
    example(folder, seed=seed)
    world = trained_world(seed)
    server = ["server", "start", "model", "--run", "server", "--insecure", "--port", str(free_port())]
    server += ["--config", "run.yaml"]
    client = ["client", "join", "server/invitation.json", "--work", "client"]
    client += ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    started = time.monotonic()
    programs = [_start(folder, "server", server)]
    try:
        _wait(lambda: (folder / "server" / "invitation.json").exists(), programs)
        programs.append(_start(folder, "client", client))
        _wait(lambda: all(program.poll() is not None for program in programs), programs)
    finally:
        for program in programs:
            if program.poll() is None:
                program.terminate()
                with suppress(subprocess.TimeoutExpired):
                    program.wait(20)
    seconds, final = time.monotonic() - started, folder / "server" / "final"
    lines = []
    for label, name, checkpoint, spent in (
        (ORIGINAL, ORIGINAL, world.original, None),
        (RETRAINED, RETRAINED, world.retrained, None),
        (THIS_RUN, "MPU over a network, hardened", final, seconds),
    ):
        write_metrics(folder, label, metrics := metrics_of(checkpoint, sets_of(world)))
        lines.append(line_of(name, metrics, seconds=spent))
    write_answers(folder / "client", world, final)
    pages = report(folder).pages
    times = {"unlearning": seconds, "all": time.monotonic() - begin}
    return NetworkDemoResult(lines, times, str(final), str(folder), pages)


def _start(folder: Path, name: str, arguments: list[str]) -> subprocess.Popen[str]:
    """Starts one party. Its output is shown line by line, with its name in front."""
    say(f"{name}$ mpunlearn {' '.join(arguments)}")
    command = [sys.executable, "-m", "mpunlearn.cli", *arguments]
    program = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def show() -> None:
        for line in program.stdout or ():
            say(f"{name:>6} | {line.rstrip()}")

    threading.Thread(target=show, daemon=True).start()
    return program


def _wait(done: Callable[[], bool], programs: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not done():
        if any(program.poll() for program in programs):
            raise NetworkError("one of the parties failed; its last output lines above say why")
        if time.monotonic() > end:
            raise NetworkError(f"the demo did not finish within {TIMEOUT_SECONDS:g} s; see the output above")
        time.sleep(0.1)
