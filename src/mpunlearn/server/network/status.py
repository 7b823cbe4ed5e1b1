"""The progress of a run: the server writes it to status.json, and `server status` shows it."""

import fcntl
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import StateError
from mpunlearn.files import as_path
from mpunlearn.schema import read, write

if TYPE_CHECKING:
    from mpunlearn.server.network.folder import RunFolder

SEEN_SECONDS = 60.0
"""A node counts as connected if the courier has seen it within this time."""
BEAT_SECONDS = 5.0
"""Heartbeat interval: how often the server touches status.json while nothing changes."""


@dataclass(frozen=True)
class ClientStatus:
    """The state of one client."""

    connected: bool
    """Whether a node relays messages for the client."""
    dropped: str | None
    """The reason why the client was dropped, if it was."""
    updates: int
    """Number of accepted updates in this round."""
    of: int
    """Number of updates that the round needs from the client."""
    bytes: int
    """Total size of the accepted updates."""
    node: str | None = None
    """The node that relays messages for the client."""


@dataclass(frozen=True)
class Status:
    """The content of status.json."""

    run: str
    round: int
    rounds: int
    phase: str
    clients: dict[str, ClientStatus]
    expected_clients: int
    copies: int
    copy_bytes: int
    """Total size of the copies of the round."""
    at: float = 0.0
    """When the status was written, in seconds since the epoch."""
    format: int = 1


class StatusFile:
    """Writes status.json whenever something has changed, and touches it as a heartbeat."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._written: Status | None = None
        self._beat = 0.0

    def show(self, status: Status) -> None:
        """Writes the status if it has changed."""
        if status != self._written:
            self._written = status
            write(self._file, replace(status, at=time.time()))
            self._beat = time.monotonic()
        elif time.monotonic() - self._beat > BEAT_SECONDS:
            os.utime(self._file)
            self._beat = time.monotonic()


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run as shown by `server status`."""

    path: str
    running: bool
    """Whether a server process is running the run."""
    started: float
    """When the plan was written, in seconds since the epoch."""
    last_sign: float | None
    """Time of the last heartbeat, in seconds since the epoch; None if there was none."""
    last_seen: dict[str, float]
    """Client → when its node was last seen, in seconds since the epoch."""
    status: Status | None
    """None if the run has not started yet."""

    def to_json(self) -> dict[str, Any]:
        """The status as JSON."""
        return asdict(self)

    def text(self) -> str:
        """The status as a few lines of text."""
        if self.status is None:
            return "not started" + ("" if self.running else f"; start it with `mpunlearn server resume {self.path}`")
        status, now = self.status, time.time()
        per_round = sum(client.of for client in status.clients.values()) or status.copies * status.expected_clients
        per_round = max(1, per_round)
        done = (status.round - 1) * per_round + sum(client.updates for client in status.clients.values())
        complete = status.phase == "complete"
        elapsed = (status.at if complete else now) - self.started
        left = (
            ""
            if not done or complete or not self.running
            else (f", about {elapsed * (status.rounds * per_round - done) / done:.0f} s left")
        )
        lines = [
            f"run {status.run[:8]}: {status.phase}, round {status.round} of {status.rounds}, {elapsed:.0f} s{left}"
        ]
        if complete:
            return "\n".join([*lines, str(Path(self.path) / "final")])
        if not self.running:
            ago = "" if self.last_sign is None else f"; last heartbeat {_ago(now - self.last_sign)}"
            lines.append(f"the server is not running{ago}; resume with `mpunlearn server resume {self.path}`")
        lines.append(f"copies: {status.copies} of {status.copy_bytes / max(1, status.copies) / 1e6:.1f} MB")
        for client, entry in status.clients.items():
            lines.append(
                f"client {client[:16]}: {self._connection(client, entry, now)}, {entry.updates} of {entry.of} updates, "
                f"{entry.bytes / 1e6:.1f} MB"
            )
        lines += ["waiting for another client to connect"] * (status.expected_clients - len(status.clients))
        return "\n".join(lines)

    def _connection(self, client: str, entry: ClientStatus, now: float) -> str:
        if entry.dropped:
            return f"dropped: {entry.dropped}"
        if not entry.connected:
            return "not connected yet"
        seen = self.last_seen.get(client)
        if seen is None or now - seen > SEEN_SECONDS:
            return "not connected" + ("" if seen is None else f", last seen {_ago(now - seen)}")
        return "connected"


def status(run: str | Path, *, watch: bool = False) -> RunStatus:
    """Shows the progress of a run.

    Args:
        run: The run's directory.
        watch: Refresh the display every second until the run is complete.

    Returns:
        The status.

    Raises:
        StateError: There is no run in the directory.
    """
    folder = as_path(run, "run")
    current = run_status(folder)
    while watch and (current.status is None or current.status.phase != "complete"):
        clear = "\033[2J\033[H" if sys.stdout.isatty() else ""
        print(f"{clear}{current.text()}", flush=True)
        time.sleep(1)
        current = run_status(folder)
    return current


def run_status(path: Path) -> RunStatus:
    """The status of the run in a directory; errors as for `status`."""
    from mpunlearn.server.network.folder import RunFolder

    folder = RunFolder(path)
    if not folder.plan.is_file():
        raise StateError(f"{path}: contains no run; start one with `mpunlearn server start`")
    started = folder.plan.stat().st_mtime
    if not folder.status.exists():
        return RunStatus(str(path), is_locked(path), started, None, {}, None)
    current, last_sign = read(Status, folder.status), folder.status.stat().st_mtime
    seen = {client: _last_seen(folder, entry.node) for client, entry in current.clients.items()}
    known = {client: at for client, at in seen.items() if at is not None}
    return RunStatus(str(path), is_locked(path), started, last_sign, known, current)


def _last_seen(folder: "RunFolder", node: str | None) -> float | None:
    file = folder.nodes / node if node is not None else None
    return file.stat().st_mtime if file is not None and file.exists() else None


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of the run's directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _ago(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
