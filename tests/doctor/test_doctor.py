"""`doctor`, on machines and runs that are broken in real ways."""

import dataclasses
import datetime
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mpunlearn.cli import main
from mpunlearn.doctor import machine, parties
from mpunlearn.doctor.doctor import doctor
from mpunlearn.doctor.findings import Finding, Health
from mpunlearn.errors import NotReadyError
from mpunlearn.protocol.flower.keys import Invitation, certificates, client_keys, invite
from mpunlearn.protocol.flower.programs import free_port
from mpunlearn.protocol.identity import Identity
from mpunlearn.server.plan import RunPlan, Service


@pytest.fixture
def run(tmp_path: Path, save_tiny) -> Path:
    """The directory of a run over a network that is not being served."""
    folder, port = tmp_path / "run", free_port()
    service = Service("127.0.0.1", port, "127.0.0.1")
    RunPlan(checkpoint=str(save_tiny()), service=service).pin(folder / "plan.json")
    Identity.at(folder / "identity.key")
    certificates(folder / "flower", "127.0.0.1")
    (folder / "flower").chmod(0o700)
    (folder / "state").mkdir(mode=0o700)
    (folder / "state" / "secret.key").write_bytes(os.urandom(32))
    (folder / "state" / "secret.key").chmod(0o600)
    return folder


def findings(*arguments, **options) -> dict[str, Finding]:
    """What `doctor` found, by check, on a port that no other test uses."""
    try:
        health = doctor(*arguments, **options if arguments else {"port": free_port(), **options})
    except NotReadyError as error:
        health = error.report
    assert isinstance(health, Health)
    return {finding.check: finding for finding in health.findings}


def failures(*arguments, **options) -> set[str]:
    found = findings(*arguments, **options)
    assert all(finding.advice for finding in found.values() if finding.status != "ok")
    return {name for name, finding in found.items() if finding.status == "failed"}


def issued(begin: datetime.timedelta, end: datetime.timedelta) -> bytes:
    """A certificate that is valid between two times relative to now, as PEM."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now + begin).not_valid_after(now + end)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_healthy_run_can_start_and_says_so(run: Path, capsys) -> None:
    assert main(["doctor", str(run), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ready"] is True
    checks = {finding["check"] for finding in printed["findings"]}
    assert {"run", "libraries", "PyTorch", "Flower", "permissions", "certificate server.pem", "clock"} <= checks
    assert not list(run.rglob("*doctor*"))


@pytest.mark.parametrize("name", ["identity.key", "state/secret.key", "flower/server.key"])
def test_a_key_that_others_can_read(run: Path, name: str, capsys) -> None:
    secret = (run / name).read_bytes()
    (run / name).chmod(0o644)
    assert main(["doctor", str(run)]) == 4
    captured = capsys.readouterr()
    assert f"chmod 600 {run / name}" in captured.out
    assert captured.err == "mpunlearn doctor: a run cannot start: permissions\n"
    assert secret.hex() not in captured.out
    assert str(secret) not in captured.out
    (run / name).chmod(0o600)
    assert not failures(run)


def test_a_state_that_others_can_enter_or_that_is_a_link(run: Path) -> None:
    (run / "state").chmod(0o755)
    assert failures(run) == {"permissions"}
    (run / "state").chmod(0o700)
    (run / "state" / "secret.key").rename(run.parent / "elsewhere")
    (run / "state" / "secret.key").symlink_to(run.parent / "elsewhere")
    assert failures(run) == {"permissions"}


def test_a_lineage_that_others_can_enter(tmp_path: Path) -> None:
    lineage = Path(os.environ["XDG_DATA_HOME"]) / "mpunlearn" / "lineages" / "0123"
    lineage.mkdir(parents=True, mode=0o700)
    (lineage / "secret.key").write_bytes(os.urandom(32))
    (lineage / "secret.key").chmod(0o600)
    assert not failures()
    lineage.chmod(0o750)
    assert failures() == {"lineages"}
    lineage.chmod(0o700)
    (lineage / "secret.key").chmod(0o604)
    assert failures() == {"lineages"}


@pytest.mark.parametrize(
    ("begin", "end", "status", "text"),
    [
        (-20, -1, "failed", "expired"),
        (1, 20, "failed", "not begun"),
        (-1, 20, "warning", "ends in"),
        (-1, 99, "ok", "valid from"),
        (-99, 99, "ok", "valid from"),
    ],
)
def test_the_dates_of_a_certificate(run: Path, begin: int, end: int, status: str, text: str) -> None:
    pem = issued(datetime.timedelta(days=begin), datetime.timedelta(days=end))
    (run / "flower" / "server.pem").write_bytes(pem)
    found = findings(run)["certificate server.pem"]
    assert (found.status, text in found.found) == (status, True)
    (run / "flower" / "server.pem").write_bytes(pem[:100])
    assert findings(run)["certificate server.pem"].status == "failed"


def test_a_port_that_another_program_uses(run: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert failures(port=port) == {f"port {port}"}
    assert f"port {port}" not in failures(port=port)
    assert main(["doctor", "--port", "70000"]) == 2
    assert failures(host="192.0.2.1", port=9100) == {"port 9100"}  # an address of another machine (RFC 5737)


def test_the_port_of_a_run_that_is_being_served(run: Path) -> None:
    from mpunlearn.server.state import locked

    plan = RunPlan.read(run / "plan.json")
    with socket.socket() as server:
        server.bind(("127.0.0.1", plan.service.port))
        server.listen()
        assert failures(run) == {f"port {plan.service.port}"}
        with locked(run):
            assert not failures(run)


def test_stores(run: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    assert findings(store=str(shared))["store"].status == "warning"
    assert not shared.exists()
    shared.mkdir()
    assert findings(store=str(shared))["store"].status == "ok"
    assert findings(store=f"file://{shared}")["store"].status == "ok"
    assert not list(shared.iterdir())
    (tmp_path / "link").symlink_to(shared)
    assert failures(store=f"file://{tmp_path}/link") == {"store"}
    assert failures(store=str(run / "plan.json")) == {"store"}
    assert "store" in failures(store="ftp://user:password@host/x")
    found = findings(store="ftp://user:password@host/x")["store"]
    assert "password" not in found.found + found.advice


def test_the_store_of_a_run_is_checked(run: Path, tmp_path: Path) -> None:
    (run / "plan.json").unlink()
    plan = RunPlan(checkpoint=str(tmp_path / "model"), service=Service("127.0.0.1", free_port(), "127.0.0.1"))
    federation = dataclasses.replace(plan.service.federation, store="nothing://nowhere")
    dataclasses.replace(plan, service=dataclasses.replace(plan.service, federation=federation)).pin(run / "plan.json")
    assert failures(run) == {"store"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a file system")
def test_a_full_and_a_read_only_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this container cannot mount a file system")
    try:
        (small / "filler").write_bytes(bytes(60_000))
        with pytest.raises(OSError, match="space"):
            (small / "more").write_bytes(bytes(60_000))
        found = machine.disk(small)
        assert found.status == "failed"
        assert "space" in found.found
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        assert "ead-only" in machine.disk(small).found
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = machine.disk(tmp_path / "not" / "yet")
    assert "MB/s" in found.found
    assert not list(tmp_path.iterdir())


def test_a_clock_before_the_installation(tmp_path: Path, monkeypatch) -> None:
    now = Path(machine.__file__).stat().st_mtime
    monkeypatch.setattr(machine.time, "time", lambda: now - 10 * 86400)
    assert machine.clock(tmp_path).status == "failed"
    monkeypatch.setattr(machine.time, "time", lambda: datetime.datetime.now().timestamp() + 100)
    assert "off" in machine.clock(tmp_path).found


def test_a_client_and_its_server(tmp_path: Path) -> None:
    work, port = tmp_path / "work", free_port()
    client_keys(work)
    invite(tmp_path / "invitation.json", Invitation(f"127.0.0.1:{port}", "0" * 64))
    options = {"invitation": tmp_path / "invitation.json", "work": work}
    assert failures(**options) == {"server"}
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        assert not failures(**options)
        (work / "node.key").chmod(0o640)
        assert failures(**options) == {"client's keys"}
    (tmp_path / "invitation.json").write_text("{}")
    assert failures(**options) == {"server", "client's keys"}


def test_a_server_whose_certificate_is_not_that_of_the_invitation(tmp_path: Path) -> None:
    import ssl
    import threading

    ca, certificate, key = certificates(tmp_path / "ours", "127.0.0.1")
    other, _, _ = certificates(tmp_path / "theirs", "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                try:
                    context.wrap_socket(connection, server_side=True).close()
                except OSError:
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        trusted, stranger = (
            list(parties.server(Invitation(address, "0" * 64, authority.read_text())))[-1] for authority in (ca, other)
        )
        thread.join()
    assert trusted.status == "ok"
    assert "TLS" in trusted.found
    assert (stranger.status, "not trusted" in stranger.found) == ("failed", True)


def test_a_run_in_one_process_needs_no_port_and_its_keys_are_checked(tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    model.mkdir()
    RunPlan(str(model)).pin(run / "server" / "plan.json")
    Identity.at(run / "server" / "identity.key")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not failures(run, port=taken.getsockname()[1])
    (run / "server" / "identity.key").chmod(0o644)
    assert failures(run) == {"permissions"}


def test_no_run_and_a_run_without_its_model(run: Path, tmp_path: Path) -> None:
    assert "run" in failures(tmp_path / "nothing")
    RunPlan(checkpoint="gone").pin(tmp_path / "other" / "server" / "plan.json")
    assert failures(tmp_path / "other") == {"run"}


def test_it_works_where_libraries_are_missing(run: Path) -> None:
    """Neither torch nor Flower nor any other library for training or the network."""
    code = """
import importlib.metadata, sys
from mpunlearn.cli import main

MISSING = {"torch", "flwr", "transformers", "numpy", "safetensors", "psutil", "httpx", "fsspec"}

class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

version = importlib.metadata.version
def absent(name):
    if name in MISSING:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = absent
sys.meta_path.insert(0, Missing())
sys.exit(main(["doctor", *sys.argv[1:], "--json"]))
"""
    for arguments in ([], [str(run), "--store", str(run)]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 4, done.stderr
        found = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert found["PyTorch"]["status"] == found["libraries"]["status"] == "failed"
        assert "torch missing" in found["libraries"]["found"]
        assert found["Flower"]["status"] != "ok"
    assert found["store"]["status"] == "failed"
