"""Runs Flower's programs as child processes, in a controlled environment, and restarts them when they die.

A killed program leaves its own children running, and so does this process when it is killed. All of them have the
FLWR_HOME of this run in their environment, so they can be found and killed before a replacement is started.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mpunlearn.errors import NetworkError

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Disables telemetry, update checks, and the installation of packages at run time."""
RESTART_SECONDS = 3.0
"""Minimum time between two starts of a program."""


class Program:
    """A program that is kept running.

    Args:
        command: name of a script in the folder of the running Python interpreter, and its arguments.
        log: file to append the output to.
        home: Flower's home folder, for its configuration and runs.
    """

    def __init__(self, command: Sequence[str], log: Path, home: Path) -> None:
        self.command, self._log, self._home = list(command), log, home.resolve()
        self._child: subprocess.Popen[bytes] | None = None
        self._begun = 0.0

    def ensure_running(self) -> bool:
        """Starts the program if it is not running; returns whether it was started."""
        if self._child is not None and self._child.poll() is None:
            return False
        if time.monotonic() - self._begun < RESTART_SECONDS:
            return False
        self._begun = time.monotonic()
        kill_orphans(self._home)
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [script(self.command[0]), *self.command[1:]],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment(self._home),
            )
        return True

    def stop(self) -> None:
        """Terminates the program and all its children."""
        if self._child is not None:
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(5)
        kill_orphans(self._home)


def kill_orphans(home: Path) -> None:
    """Kills all other processes that have this FLWR_HOME in their environment."""
    import psutil

    killed = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("FLWR_HOME") == str(home.resolve()):
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, 5)


def script(name: str) -> str:
    """The path of a script in the folder of the running Python interpreter.

    Raises:
        NetworkError: Flower is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise NetworkError(f"{name}: not found next to {sys.executable}; run `pip install 'mpunlearn[network]'`")
    return str(path)


def environment(home: Path) -> Mapping[str, str]:
    """The environment of Flower's programs. Its PATH lets them find each other's scripts."""
    return {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(home.resolve()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def free_port() -> int:
    """Returns a port that is free on the loopback address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_port(port: int, seconds: float, what: str) -> None:
    """Waits until a program is listening on a port of the loopback address.

    Args:
        port: the port.
        seconds: how long to wait.
        what: name of the program, for the error message.

    Raises:
        NetworkError: no program is listening after this time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise NetworkError(f"{what} is not listening on port {port} after {seconds:g} s; see its log")
