"""Runs Flower's programs as child processes, in a controlled environment, and restarts them when they die or hang.

Each program is a child of this process: Flower's own supervision ends with the SuperExec, which neither the SuperLink
nor the SuperNode replaces, so it is started here as well. A program's sign of life is that its main thread is scheduled
now and then, which each of them does several times a second; one that is stopped or blocked is killed and replaced.

A killed program leaves its own children running, and so does this process when it is killed. All of them have the
FLWR_HOME of this run and the name of their program in their environment, so they can be found and killed before a
replacement is started. Nothing else of this process's environment is passed on, since it may hold secrets.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from site import getuserbase

from mpunlearn.errors import NetworkError
from mpunlearn.progress import say

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Disables telemetry, update checks, and the installation of packages at run time."""
QUICK = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
"""How often a SuperExec asks its own machine for an app to start, in seconds (Flower's default: 1)."""
KEPT = ("LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
"""What else of this process's environment is passed on."""
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy")
"""What a SuperNode may need in addition to reach the server."""
RESTART_SECONDS = 3.0
"""Minimum time between two starts of a program."""
PATIENT_SECONDS = 10.0
"""Minimum time between two starts of a program that has failed `MAX_FAILURES` times in a row."""
MAX_FAILURES = 3
STEADY_SECONDS = 60.0
"""A program that has run for this long is not counted as having failed when it ends."""
SILENCE_SECONDS = 60.0
"""A program that has shown no sign of life for this long is replaced."""
MAX_LOG_BYTES = 4_000_000
"""A larger log replaces the previous one, so that a program's logs never take more than twice this space."""


class Program:
    """A program that is kept running.

    Args:
        name: what the program is called in messages and in its environment.
        command: the program and its arguments.
        log: file to append the output to.
        home: Flower's home folder, for its configuration and runs.
        keep: further variables of this process's environment that it needs.
        hint: a frequent reason why it ends, for the message that it does.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, home: Path, keep: Iterable[str] = (), hint: str = ""
    ) -> None:
        self.name, self.command, self._hint = name, list(command), hint
        self._log, self._home, self._keep = log, home.resolve(), tuple(keep)
        self._child: subprocess.Popen[bytes] | None = None
        self._begun = self._seen = -PATIENT_SECONDS
        self._failures = self._switches = 0

    def ensure_running(self) -> bool:
        """Starts the program if it is not running or shows no sign of life; returns whether it was started."""
        limit_log(self._log)
        now = time.monotonic()
        if self._child is not None and self._child.poll() is None:
            if not self._is_silent(now):
                return False
            self._child.kill()
            self._child.wait()
        if now - self._begun < (RESTART_SECONDS if self._failures < MAX_FAILURES else PATIENT_SECONDS):
            return False
        if self._child is not None:
            self._count_failure(now)
        self._begun = self._seen = now
        kill_orphans(self._home, self.name)
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**environment(self._home, self._keep), "MPUNLEARN_PROGRAM": self.name},
                start_new_session=True,  # Ctrl-C is for this process, which then stops its programs in order
            )
        return True

    def stop(self) -> None:
        """Terminates the program and all its children."""
        if self._child is not None:
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(5)
        kill_orphans(self._home, self.name)
        if self._child is not None:
            self._child.wait()

    def _is_silent(self, now: float) -> bool:
        """Whether the main thread has not been scheduled for `SILENCE_SECONDS`."""
        import psutil

        assert self._child is not None
        try:
            switches = sum(psutil.Process(self._child.pid).num_ctx_switches())
        except psutil.Error:
            return False  # it has just ended
        if switches != self._switches:
            self._switches, self._seen = switches, now
        return now - self._seen > SILENCE_SECONDS

    def _count_failure(self, now: float) -> None:
        assert self._child is not None
        self._failures = self._failures + 1 if now - self._begun < STEADY_SECONDS else 1
        if self._failures == MAX_FAILURES:
            code = self._child.returncode
            how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            say(
                f"{self.name} has ended {MAX_FAILURES} times in a row, last with {how}; see {self._log} for the reason and "
                f"resolve it{self._hint and f' ({self._hint})'}; it is started again every {PATIENT_SECONDS:g} s"
            )


def limit_log(log: Path) -> None:
    """Moves the content of a log that has grown too large to LOG.1; its writers append to the emptied file."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > MAX_LOG_BYTES:
            with log.open("rb") as full, log.with_name(f"{log.name}.1").open("wb") as old:
                full.seek(-MAX_LOG_BYTES, os.SEEK_END)
                shutil.copyfileobj(full, old)
            os.truncate(log, 0)


def kill_orphans(home: Path, name: str | None = None) -> None:
    """Kills all other processes that have this FLWR_HOME in their environment, or those of one program."""
    import psutil

    killed = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ() if process.pid != os.getpid() else {}
            if variables.get("FLWR_HOME") == str(home.resolve()) and name in (None, variables.get("MPUNLEARN_PROGRAM")):
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


def confined(name: str, arguments: Sequence[str], *, read: Iterable[Path], write: Iterable[Path]) -> list[str]:
    """The command that runs one of Flower's scripts confined to some folders (see `launch`).

    Raises:
        NetworkError: Flower is not installed.
    """
    folders = {"read": [str(path.resolve()) for path in read], "write": [str(path.resolve()) for path in write]}
    module = "mpunlearn.protocol.flower.launch"
    return [sys.executable, "-P", "-m", module, json.dumps(folders), script(name), *arguments]


def environment(home: Path, keep: Iterable[str] = ()) -> Mapping[str, str]:
    """The environment of Flower's programs. Its PATH lets them find each other's scripts."""
    home = home.resolve()
    (home / "tmp").mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = {name: os.environ[name] for name in (*KEPT, *keep) if name in os.environ}
    if "PYTHONPATH" in os.environ:
        entries = [entry for entry in os.environ["PYTHONPATH"].split(os.pathsep) if entry]
        kept["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, entries))
    places = {"FLWR_HOME": str(home), "HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONUSERBASE": getuserbase()}
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    return {**kept, **QUIET, **QUICK, **places, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def free_port() -> int:
    """Returns a port that is free on the loopback address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_listening(port: int) -> bool:
    """Whether a program is listening on a port of the loopback address."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


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
        if is_listening(port):
            return
        time.sleep(0.2)
    raise NetworkError(f"{what} is not listening on port {port} after {seconds:g} s; see its log")
