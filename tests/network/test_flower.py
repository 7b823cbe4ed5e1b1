"""The real programs on this machine: SuperLink, ServerApp, two SuperNodes, two workers, TLS, and kill -9 to each of them."""

import json
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from tests.network.federation import tiny_world
from tests.network.stage import TRAINING, Stage, kill_flower

from mpunlearn.checkpoint import checkpoint_digest
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.network.worker import Worker
from mpunlearn.protocol.flower.courier.mail import Mail
from mpunlearn.protocol.flower.courier.spool import exchange
from mpunlearn.protocol.flower.keys import certificates, client_keys, read_invitation, read_keys
from mpunlearn.protocol.flower.programs import environment, free_port, script
from mpunlearn.protocol.record.verification import verify
from mpunlearn.server.network.coordinator import Coordinator
from mpunlearn.server.plan import RunPlan

pytest.importorskip("flwr")


def undisturbed(run: Path, folder: Path, files: tuple[Path, Path]) -> str:
    """The digest of what a run leads to when everything happens in this process and nothing is killed."""
    coordinator = Coordinator(RunPlan.read(run / "plan.json"), run)
    mail = Mail(coordinator.folder.mail)
    policy = Policy(coordinator.identity.public)
    workers = [
        Worker(folder / f"spool-{name}", folder / name, policy, forget=files[0], retain=files[1]) for name in ("a", "b")
    ]
    for _ in range(400):
        if coordinator.step():
            return checkpoint_digest(run / "final")
        for number, worker in enumerate(workers, start=1):
            (coordinator.folder.nodes / str(number)).touch()
            for _ in range(2):
                record = mail.load(str(number))
                if record is not None:
                    deliver = dict(zip(record["names"], record["jobs"], strict=True))
                    found, missing = exchange(folder / f"spool-{'ab'[number - 1]}", deliver, record["wanted"], 0)
                    answers = {"names": list(found), "results": list(found.values()), "missing": missing}
                    mail.unload(str(number), answers)
                worker.step()
    raise AssertionError("not complete")


@pytest.mark.slow
def test_every_program_is_killed_once_and_the_result_is_the_same(stage: Stage, tmp_path: Path) -> None:
    files = tiny_world(tmp_path)
    for name in ("a", "b"):
        client_keys(tmp_path / name)
    port = free_port()
    options = [*TRAINING.split(), "--clients", "2", "--trust", "a/client.json,b/client.json", "--port", str(port)]
    stage.start("server", "server", "start", "model", "--run", "run", *options)
    stage.wait("server", "round 1: 2 copies published")
    stage.kill("server")  # its SuperLink goes on, and has to give way
    reference = tmp_path / "reference"
    shutil.copytree(tmp_path / "run", reference / "run")
    for name in ("a", "b"):
        shutil.copytree(tmp_path / name, reference / name)
    expected = undisturbed(reference / "run", reference, files)

    def server() -> None:
        stage.start("server", "server", "resume", "run")

    def join(name: str) -> None:
        stage.start(f"join-{name}", "client", "join", "run/invitation.json", "--work", name, "--spool", f"spool-{name}")

    def work(name: str) -> None:
        places = ["--spool", f"spool-{name}", "--work", name, "--policy", "policy.toml"]
        stage.start(f"work-{name}", "client", "work", *places, "--forget", "forget.jsonl", "--retain", "retain.jsonl")

    server()
    stage.wait("server", "clients join with", 2)
    invitation = read_invitation(tmp_path / "run" / "invitation.json")
    (tmp_path / "policy.toml").write_text(f'server_key = "{invitation.server_key}"\n')
    for name in ("a", "b"):
        join(name)
        work(name)

    stage.wait("work-a", "unlearning")
    stage.kill("work-a")
    work("a")
    stage.wait("server", "update of copy", 1)
    stage.kill("join-b")
    join("b")
    stage.wait("work-b", "unlearning")
    stage.kill("work-b")
    work("b")
    stage.wait("server", "update of copy", 3)
    kill_flower(tmp_path / "a" / "flower", "flower-supernode")
    kill_flower(tmp_path / "b" / "flower", "flower-superexec")  # which the SuperNode itself does not replace
    stage.wait("server", "round 1 of 3 is complete")
    kill_flower(tmp_path / "run" / "flower", "flower-superlink")
    stage.wait("server", "round 2 of 3 is complete")
    kill_flower(tmp_path / "run" / "flower", "mpunlearn.server.network.gateway")
    kill_flower(tmp_path / "run" / "flower", "flower-superexec")  # the courier dies with it
    stage.wait("server", "update of copy", 10)
    stage.kill("server")
    server()
    stage.wait("server", "round 3 of 3 is complete")
    for name in ("server", "work-a", "work-b"):
        assert stage.running[name].wait(60) == 0, stage.log(name)
    assert checkpoint_digest(tmp_path / "run" / "final") == expected
    found = verify([tmp_path / "run", tmp_path / "a", tmp_path / "b"])
    assert (found.problems, found.bundle.absent) == ([], [])
    kinds = Counter(event.event.kind for event in found.bundle.events)
    assert kinds == {"published": 6, "updated": 12, "aggregated": 3}


@pytest.mark.slow
def test_a_client_with_the_certificate_reaches_nothing_but_the_node_paths(stage: Stage, tmp_path: Path) -> None:
    """Neither a run nor a key: with Flower's own tool and with bare requests."""
    tiny_world(tmp_path)
    client_keys(tmp_path / "a")
    client_keys(tmp_path / "stranger")
    port = free_port()
    options = [*TRAINING.split(), "--trust", "a/client.json", "--port", str(port)]
    stage.start("server", "server", "start", "model", "--run", "run", *options)
    stage.wait("server", "clients join with")
    invitation = read_invitation(tmp_path / "run" / "invitation.json")
    assert invitation.address == f"127.0.0.1:{port}"
    home = tmp_path / "attacker"
    home.mkdir()
    (home / "ca.crt").write_text(str(invitation.ca))
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "x"\n[superlink.x]\naddress = "{invitation.address}"\nroot-certificates = "{home}/ca.crt"\n'
    )
    (home / "node.pub").write_text(read_keys(tmp_path / "stranger" / "client.json").node)

    def flwr(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [script("flwr"), *arguments]
        return subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=60)

    from mpunlearn.server.network.superlink import APP

    for arguments in (["run", str(APP), "x"], ["supernode", "register", str(home / "node.pub"), "x"], ["list", "x"]):
        done = flwr(*arguments)
        assert done.returncode != 0, done.stdout
        assert "Successfully" not in done.stdout + done.stderr
    context = ssl.create_default_context(cafile=str(home / "ca.crt"))
    paths = [
        "/v1/control/start-run",
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/",
    ]
    paths += [
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "//v1/control/start-run",
        "/v1/fleet",
    ]
    for path in paths:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"https://{invitation.address}{path}", data=b"x", context=context, timeout=20)
        caught.value.close()
        assert caught.value.code == 404, path
    with pytest.raises(urllib.error.HTTPError) as caught:  # a node's path, without a node's key
        urllib.request.urlopen(
            f"https://{invitation.address}/v1/fleet/register-node", data=b"", context=context, timeout=20
        )
    caught.value.close()
    assert caught.value.code in (400, 401, 403, 415, 422)
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):  # nor anybody without the certificate
        urllib.request.urlopen(f"https://{invitation.address}/", data=b"x", timeout=20)
    # A node with a key that was not registered is not seen by the run.
    stage.start("stranger", "client", "join", "run/invitation.json", "--work", "stranger")
    log = tmp_path / "stranger" / "flower" / "supernode.log"
    end = time.monotonic() + 40
    while time.monotonic() < end and not (log.exists() and "shutdown complete" in log.read_text()):
        time.sleep(0.2)
    assert "shutdown complete" in log.read_text()  # Flower turned it away
    assert not list((tmp_path / "run" / "mail" / "nodes").glob("*"))


def test_insecure_is_for_this_machine_only(tmp_path: Path) -> None:
    from mpunlearn.errors import PlanError
    from mpunlearn.protocol.flower.keys import Invitation
    from mpunlearn.server.network.serve import start

    tiny_world(tmp_path)
    model = tmp_path / "model"
    for options, why in (
        ({"host": "0.0.0.0", "insecure": True}, "only allowed on a loopback address"),
        ({"host": "example.org", "insecure": True}, "only allowed on a loopback address"),
        ({"listen": "0.0.0.0", "insecure": True}, "only allowed on a loopback address"),
        ({}, "give --trust"),
        ({"insecure": True, "trust": "a"}, "give --trust"),
        ({"insecure": True, "port": 0}, "--port"),
        ({"insecure": True, "rounds": 0}, "--rounds"),
    ):
        with pytest.raises(PlanError, match=why):
            start(model, run=tmp_path / "run", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "run").exists()
    file = tmp_path / "invitation.json"
    file.write_text(json.dumps({"address": "example.org:9100", "server_key": "0" * 64, "ca": None}))
    with pytest.raises(PlanError, match="is not a loopback address, but the invitation has no certificate"):
        read_invitation(file)
    assert Invitation("127.0.0.1:9100", "0" * 64).ca is None


def test_a_used_port_is_an_error_at_start(tmp_path: Path) -> None:
    from mpunlearn.errors import NetworkError
    from mpunlearn.server.network.serve import start

    tiny_world(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            NetworkError, match=f"--port {port}: cannot listen on 127.0.0.1:{port}.*choose another --port"
        ):
            start(tmp_path / "model", run=tmp_path / "run", insecure=True, port=port)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_joining_says_what_it_waits_for(tmp_path: Path) -> None:
    from mpunlearn.protocol.flower.keys import Invitation, invite

    (tmp_path / "forget.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n')
    port = free_port()
    invite(tmp_path / "invitation.json", Invitation(f"127.0.0.1:{port}", "0" * 64))
    stage = Stage(tmp_path)
    try:
        stage.start("join", "client", "join", "invitation.json", "--work", "work", "--forget", "forget.jsonl")
        stage.wait("join", f"127.0.0.1:{port}", seconds=30)
        assert stage.log("join").startswith(f"nothing is listening at 127.0.0.1:{port} yet; retrying: is the server up")
    finally:
        stage.stop()


def test_certificates_are_for_the_host_and_verified(tmp_path: Path) -> None:
    ca, certificate, key = certificates(tmp_path / "tls", "10.1.2.3")
    assert certificates(tmp_path / "tls", "10.1.2.3") == (ca, certificate, key)
    assert key.stat().st_mode & 0o077 == 0
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(ca))
    for name, good in (("10.1.2.3", True), ("127.0.0.1", True), ("10.9.9.9", False)):
        left, right = socket.socketpair()
        with left, right:
            inside, outside = ssl.MemoryBIO(), ssl.MemoryBIO()
            ours = server.wrap_bio(inside, outside, server_side=True)
            theirs_in, theirs_out = ssl.MemoryBIO(), ssl.MemoryBIO()
            theirs = client.wrap_bio(theirs_in, theirs_out, server_hostname=name)
            outcome = None
            for _ in range(8):
                for side in (theirs, ours):
                    try:
                        side.do_handshake()
                    except ssl.SSLWantReadError:
                        pass
                    except ssl.SSLError as error:
                        outcome = error
                inside.write(theirs_out.read())
                theirs_in.write(outside.read())
        assert (outcome is None) == good, (name, outcome)
