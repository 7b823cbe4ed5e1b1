"""The gateway as a program of its own, and what strangers and registered nodes can make it do."""

import base64
import datetime
import http.client
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mpunlearn.protocol.flower.keys import certificates, client_keys
from mpunlearn.protocol.flower.programs import free_port, wait_for_port
from mpunlearn.server.network.gatekeeper import MAX_STRANGERS, Bucket, Origins

pytest.importorskip("h11")
PUSH, PULL = "/v1/fleet/push-object", "/v1/fleet/pull-messages"
MAX_MESSAGE, MAX_TOTAL = 200_000, 500_000


def signed(key: Path, age: float = 0.0) -> dict[str, str]:
    """The headers with which a node signs a request."""
    private: Any = serialization.load_ssh_private_key(key.read_bytes(), None)
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    public = private.public_key().public_bytes(serialization.Encoding.PEM, kind)
    timestamp = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)).isoformat()
    signature = private.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
    values = (base64.b64encode(public).decode(), timestamp, base64.b64encode(signature).decode())
    return dict(zip(("flwr-public-key", "flwr-timestamp", "flwr-signature"), values, strict=True))


class Upstream(BaseHTTPRequestHandler):
    """A SuperLink that answers with the size of what it gets."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        size = len(self.rfile.read(int(self.headers["content-length"])))
        body = f"{self.path} {size}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Door:
    """A running gateway, and connections to it from an address of this machine."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.tls = ssl.create_default_context(cafile=str(folder / "tls" / "ca.crt"))

    def connect(self, source: str) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", self.port), 10, source_address=(source, 0))
        return self.tls.wrap_socket(raw, server_hostname="127.0.0.1")

    def status(self, lines: list[str], body: bytes = b"", source: str = "127.0.0.1") -> tuple[int, bytes]:
        """Sends a request, and returns the status and the body of the answer."""
        with self.connect(source) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            answer = http.client.HTTPResponse(connection, method="POST")
            answer.begin()
            return answer.status, answer.read()

    def post(self, path: str, headers: dict[str, str], body: bytes = b"", **options: Any) -> tuple[int, bytes]:
        headers = {"Host": "x", "Content-Length": str(len(body)), **headers}
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return self.status(lines, body, **options)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    tmp_path.chmod(0o700)
    keys = client_keys(tmp_path / "client")
    client_keys(tmp_path / "stranger")
    ca, certificate, key = certificates(tmp_path / "tls", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Upstream) as upstream:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
        upstream.socket = tls.wrap_socket(upstream.socket, server_side=True)
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        port = free_port()
        settings = {"host": "127.0.0.1", "port": port, "upstream": upstream.server_port, "ca": str(ca)}
        settings |= {"certificate": str(certificate), "key": str(key), "nodes": [keys.node]}
        settings |= {"max_message": MAX_MESSAGE, "max_total": MAX_TOTAL}
        (tmp_path / "gateway.json").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "mpunlearn.server.network.gateway", str(tmp_path / "gateway.json")]
        program = subprocess.Popen(command)
        try:
            wait_for_port(port, 30, "the gateway")
            yield Door(tmp_path, port)
        finally:
            program.kill()
            program.wait()
            upstream.shutdown()


def test_a_request_is_refused_by_its_headers_before_its_body_is_sent(door: Door) -> None:
    """Each of these announces a body of a gigabyte and sends none of it."""
    node, huge = signed(door.folder / "client" / "node.key"), {"Content-Length": "1000000000"}
    good = lambda: signed(door.folder / "client" / "node.key")  # noqa: E731
    for path, headers, expected in (
        (PUSH, {}, 401),
        (PUSH, signed(door.folder / "stranger" / "node.key"), 401),
        (PUSH, signed(door.folder / "client" / "node.key", age=400), 401),
        (PUSH, {**node, "flwr-timestamp": node["flwr-timestamp"].replace("2", "3")}, 401),
        (PUSH, good(), 413),
        (PULL, good(), 413),
        ("/v1/fleet/unknown", good(), 404),
        ("/v1/control/start-run", good(), 404),
        ("/v1/fleet/../control/start-run", good(), 404),
    ):
        assert door.post(path, {**headers, **huge})[0] == expected, path
    assert door.post(PULL, {**good(), "Content-Length": "x"})[0] == 400
    lines = [f"POST {PULL} HTTP/1.1", "Host: x", "Transfer-Encoding: chunked"]
    assert door.status([*lines, *(f"{name}: {value}" for name, value in good().items())])[0] == 411
    assert door.status([f"POST {PULL} HTTP/1.1", "Host: x", *(f"X{n}: y" for n in range(100))])[0] == 431
    assert door.status([f"POST {PULL} HTTP/1.1", "Host: x", f"X: {'y' * 20_000}"])[0] == 431


def test_what_a_registered_node_sends_arrives_up_to_what_the_plan_needs(door: Door) -> None:
    key = door.folder / "client" / "node.key"
    status, answer = door.post(PULL, signed(key), b"x" * 1000)
    assert status == 200
    assert answer == f"{PULL} 1000".encode()
    assert [door.post(PUSH, signed(key), b"x" * MAX_MESSAGE)[0] for _ in range(2)] == [200, 200]
    assert (
        door.post(PUSH, {**signed(key), "Content-Length": str(MAX_MESSAGE)})[0] == 429
    )  # more than MAX_TOTAL together
    assert door.post(PULL, signed(key), b"x")[0] == 200


def test_strangers_do_not_keep_a_node_out(door: Door) -> None:
    """Neither connections without a request, from many addresses, nor bad requests without end, from one."""
    silent = []
    for number in range(2 * MAX_STRANGERS):
        raw = socket.create_connection(("127.0.0.1", door.port), 10, source_address=(f"127.0.1.{number // 8 + 1}", 0))
        silent.append(raw)
    refused = 0
    for _ in range(60):
        with suppress(OSError):
            refused += door.post(PUSH, {}, source="127.0.0.9")[0] == 401
    assert 0 < refused < 50
    with pytest.raises((ConnectionError, ssl.SSLError)):
        door.post(PUSH, {}, source="127.0.0.9")  # turned away before the handshake
    assert door.post(PULL, signed(door.folder / "client" / "node.key"))[0] == 200
    for raw in silent:
        raw.close()


def test_an_origin_is_an_address_or_a_network_of_64_bits() -> None:
    assert Origins.of("192.0.2.1") == Origins.of("::ffff:192.0.2.1") == "192.0.2.1"
    assert Origins.of("2001:db8::1") == Origins.of("2001:db8::ffff:1") != Origins.of("2001:db8:0:1::1")


def test_a_bucket_gives_what_it_has() -> None:
    bucket = Bucket(10, 0)
    assert bucket.spend(7)
    assert not bucket.spend(4)
    assert bucket.spend(3)
