"""Flower's programs as children of this one: started in a controlled environment, and restarted when they die.

A killed program leaves its own children running, and so does this one. All of them have this run's FLWR_HOME in their
environment; by that they are found and killed before a replacement is started.
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
"""No telemetry, no update checks, no packages installed at run time."""
RESTART_SECONDS = 3.0
"""Seconds between two starts of a program."""


class Program:
    """A program that is kept running.

    Args:
        command: the name of a script installed beside this Python, and its arguments.
        log: the file that its output is appended to.
        home: Flower's folder for configuration and runs.
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
        """Terminates the program and everything that it started."""
        if self._child is not None:
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(5)
        kill_orphans(self._home)


def kill_orphans(home: Path) -> None:
    """Kills every process that runs with this FLWR_HOME."""
    import psutil

    killed = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("FLWR_HOME") == str(home.resolve()):
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, 5)


def script(name: str) -> str:
    """The path of a script that is installed beside this Python.

    Raises:
        NetworkError: Flower is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise NetworkError(f"{name}: not found beside {sys.executable}; pip install 'mpunlearn[network]'")
    return str(path)


def environment(home: Path) -> Mapping[str, str]:
    """The environment of Flower's programs; the PATH lets them find one another's scripts."""
    return {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(home.resolve()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def free_port() -> int:
    """A port of the loopback address that nothing is listening on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_port(port: int, seconds: float, what: str) -> None:
    """Waits until something is listening on a loopback port.

    Raises:
        NetworkError: nothing is, after that many seconds.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise NetworkError(f"{what} does not listen on port {port} after {seconds:g} s; see its log")
