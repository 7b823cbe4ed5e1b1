"""What `server status` shows: of a run that goes on, one that is over, and one whose server is gone."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mpunlearn.errors import SchemaError, StateError
from mpunlearn.server.network.folder import RunFolder
from mpunlearn.server.network.status import ClientStatus, RunStatus, Status, StatusFile, run_status
from mpunlearn.server.plan import RunPlan, Service
from mpunlearn.server.state import locked

CLIENT = "c" * 64


def status(**changes) -> Status:
    client = ClientStatus(connected=True, dropped=None, updates=1, of=2, bytes=3_000_000, node="5")
    plain = Status("f" * 32, 2, 3, "unlearning", {CLIENT: client}, 2, 2, 8_000_000)
    return replace(plain, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    RunPlan(checkpoint="model", service=Service("127.0.0.1", 9100, "127.0.0.1")).pin(folder.plan)
    folder.make()
    return folder


def test_a_server_that_is_gone_is_said_to_be_gone(folder: RunFolder) -> None:
    StatusFile(folder.status).show(status())
    (folder.nodes / "5").touch()
    with locked(folder.path):
        alive = run_status(folder.path)
    assert alive.running
    assert f"client {CLIENT[:16]}: connected, 1 of 2 updates, 3.0 MB" in alive.text()
    assert "not running" not in alive.text()
    ago = time.time() - 43 * 60
    for file in (folder.status, folder.nodes / "5"):
        os.utime(file, (ago, ago))
    gone = run_status(folder.path)
    assert not gone.running
    assert "the server is not running; last heartbeat 43 min ago; resume with `mpunlearn server resume" in gone.text()
    assert f"client {CLIENT[:16]}: not connected, last seen 43 min ago" in gone.text()


def test_time_left_is_an_extrapolation(folder: RunFolder) -> None:
    """4 of 4 updates in round 1 and 2 of 4 in round 2 of 3, after 60 s: 6 of 12 done."""
    clients = {CLIENT: ClientStatus(True, None, 2, 2, 0), "d" * 64: ClientStatus(True, None, 0, 2, 0)}
    shown = RunStatus("run", True, time.time() - 60, None, {}, status(clients=clients))
    assert ", 60 s, about 60 s left" in shown.text()


def test_dropped_and_expected_clients(folder: RunFolder) -> None:
    dropped = ClientStatus(connected=False, dropped="is late", updates=0, of=0, bytes=0)
    text = RunStatus("run", True, 0.0, None, {}, status(clients={CLIENT: dropped})).text()
    assert f"client {CLIENT[:16]}: dropped: is late" in text
    assert text.count("waiting for another client to connect") == 1


def test_a_complete_run_names_its_result(folder: RunFolder) -> None:
    StatusFile(folder.status).show(status(phase="complete", round=3))
    lines = run_status(folder.path).text().splitlines()
    assert "complete, round 3 of 3" in lines[0]
    assert lines[1:] == [str(folder.final)]


def test_a_status_is_written_when_it_changes_and_touched_otherwise(folder: RunFolder, monkeypatch) -> None:
    from mpunlearn.server.network import status as module

    file = StatusFile(folder.status)
    file.show(status())
    written = folder.status.read_bytes()
    os.utime(folder.status, (0, 0))
    file.show(status())
    assert folder.status.stat().st_mtime == 0  # too soon
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.0)
    file.show(status())
    assert folder.status.stat().st_mtime > 0
    assert folder.status.read_bytes() == written
    file.show(status(round=3))
    assert json.loads(folder.status.read_text())["round"] == 3


def test_what_is_not_a_status_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="contains no run"):
        run_status(tmp_path)
    folder.status.write_text('{"format": 99}')
    with pytest.raises(SchemaError, match="upgrade mpunlearn"):
        run_status(folder.path)
