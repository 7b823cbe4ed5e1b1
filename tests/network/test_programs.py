"""Flower's programs as children: what is watched, restarted and said, and whose the files between them are."""

import inspect
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tests.network.federation import tiny_world
from tests.network.stage import TRAINING, Stage

from mpunlearn.protocol.flower import launch
from mpunlearn.protocol.flower.keys import client_keys
from mpunlearn.protocol.flower.programs import free_port

pytest.importorskip("flwr")


@pytest.mark.slow
def test_a_spool_is_its_owners_and_connecting_alone_says_what_is_missing(stage: Stage, tmp_path: Path) -> None:
    from mpunlearn.protocol.flower.courier.spool import put
    from mpunlearn.protocol.flower.keys import Invitation, invite

    invite(tmp_path / "invitation.json", Invitation(f"127.0.0.1:{free_port()}", "0" * 64))
    stage.start("join", "client", "join", "invitation.json", "--work", "work", "--spool", "spool")
    stage.wait("join", "connecting only, without --forget")
    assert "left to `mpunlearn client work --spool" in stage.log("join")
    put(tmp_path / "spool" / "jobs" / "file", b"x")
    paths = (tmp_path / "spool", *(tmp_path / "spool").rglob("*"))
    assert {oct(path.stat().st_mode & 0o777) for path in paths} == {"0o700", "0o600"}
    (tmp_path / "shared" / "jobs").mkdir(parents=True)
    (tmp_path / "shared" / "jobs").chmod(0o770)  # by an owner who wants to share it
    put(tmp_path / "shared" / "jobs" / "file", b"x")
    assert (tmp_path / "shared" / "jobs" / "file").stat().st_mode & 0o777 == 0o660 & ~umask()
    with pytest.raises(OSError, match="Not a directory|Too many levels"):
        (tmp_path / "planted").symlink_to(tmp_path / "shared")
        put(tmp_path / "planted" / "file", b"x")


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_how_a_run_ended_is_known_without_doing_jobs(tmp_path: Path) -> None:
    from mpunlearn.client.network.spool import make, outcome
    from mpunlearn.protocol.identity import Identity
    from mpunlearn.protocol.messages import Finished, Sealed, seal

    make(tmp_path)
    server, other = Identity.at(tmp_path / "server.key"), Identity.at(tmp_path / "other.key")
    for identity in (other, server):
        data = seal(Finished("0" * 32, "complete"), identity)
        (tmp_path / "jobs" / Sealed.open(data).name).write_bytes(data)
        assert outcome(tmp_path, server.public) is None  # the program that does the jobs has not seen it
        (tmp_path / "results" / Sealed.open(data).name).write_bytes(b"")
        assert outcome(tmp_path, server.public) == (None if identity is other else "complete")


@pytest.mark.slow
def test_a_program_that_is_stopped_or_ends_at_once_is_replaced_and_named(tmp_path: Path, caplog, monkeypatch) -> None:
    """Stopped, not killed: its process is there, but shows no sign of life."""
    from mpunlearn.protocol.flower import programs

    monkeypatch.setattr(programs, "RESTART_SECONDS", 0.1)
    monkeypatch.setattr(programs, "SILENCE_SECONDS", 1.0)
    ticking = [sys.executable, "-c", "import time\nwhile True: time.sleep(0.1)"]
    program = programs.Program("ticking", ticking, tmp_path / "log", tmp_path / "home")
    try:
        assert program.ensure_running()
        first = program._child
        assert first is not None
        for _ in range(20):
            time.sleep(0.1)
            assert not program.ensure_running()
        first.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 20
        while not program.ensure_running():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert first.poll() is not None
        assert program._child is not first
    finally:
        program.stop()
    ending = programs.Program(
        "ending", [sys.executable, "-c", "raise SystemExit(7)"], tmp_path / "log", tmp_path / "home"
    )
    end = time.monotonic() + 20
    with caplog.at_level("INFO", logger="mpunlearn"):
        while "ending" not in caplog.text:
            assert time.monotonic() < end
            ending.ensure_running()
            time.sleep(0.05)
    ending.stop()
    assert f"ending has ended 3 times in a row, last with exit code 7; see {tmp_path / 'log'}" in caplog.text


def test_a_node_asks_soon_after_a_message_and_seldom_when_there_is_nothing_to_do() -> None:
    pauses: list[float] = []
    node = launch.Pauses(pauses.append)
    for _ in range(30):
        node.sleep(3)
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (launch.SHORTEST_SECONDS, 3)
    node.sleep(0.5)  # it waits for its app's answer to a message
    node.sleep(3)
    assert pauses[-2:] == [launch.SHORTEST_SECONDS] * 2


def test_flower_pauses_where_the_launcher_expects_it(monkeypatch) -> None:
    from flwr.supernode import start_client_internal

    assert start_client_internal.time is time
    monkeypatch.setattr(start_client_internal, "time", time)  # restored afterwards
    launch.pull_soon()
    source = inspect.getsource(start_client_internal)
    assert {float(seconds) for seconds in re.findall(r"\btime\.sleep\((.*?)\)", source)} == {0.5, 3.0}
    assert set(re.findall(r"\btime\.(\w+)", source)) == {"sleep"}


def test_a_log_never_takes_more_than_twice_its_limit(tmp_path: Path, monkeypatch) -> None:
    from mpunlearn.protocol.flower import programs

    monkeypatch.setattr(programs, "MAX_LOG_BYTES", 1000)
    with (tmp_path / "log").open("ab", buffering=0) as log:
        for number in range(100):
            log.write(b"%03d %s\n" % (number, b"x" * 95))
            programs.limit_log(tmp_path / "log")
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2200
    assert b"099" in (tmp_path / "log").read_bytes() + (tmp_path / "log.1").read_bytes()


@pytest.mark.slow
def test_a_flower_command_that_is_killed_does_not_end_the_server(stage: Stage, tmp_path: Path) -> None:
    tiny_world(tmp_path)
    client_keys(tmp_path / "a")
    options = [*TRAINING.split(), "--trust", "a/client.json", "--port", str(free_port())]
    stage.start("server", "server", "start", "model", "--run", "run", *options)
    end, killed = time.monotonic() + 60, 0
    while killed < 2:
        assert time.monotonic() < end, stage.log("server")
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                command = process.cmdline()
                if "supernode" in command and "register" in command and process.cwd() == str(tmp_path):
                    process.kill()
                    process.wait(5)
                    killed += 1
        time.sleep(0.05)
    stage.wait("server", "clients join with")
    end = time.monotonic() + 60
    while not (tmp_path / "run" / "mail" / "alive").exists():
        assert time.monotonic() < end, stage.log("server")
        time.sleep(0.2)
    assert stage.running["server"].poll() is None
    assert "Traceback" not in stage.log("server")
