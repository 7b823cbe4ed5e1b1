"""Attacks the gateway of a run from outside, and measures what an honest node notices of it and what it costs.

    python benchmarks/gateway_load.py

A real SuperLink, SuperExec, courier and gateway serve a run of a tiny model; one registered node asks for messages all
the time. Strangers from other loopback addresses, without a registered key, do in turn:

- *slow*: 500 connections that finish the handshake, send a piece of a header, and then nothing
- *bodies*: requests that announce 1 GB, and send as much of it as is taken
- *requests*: 100 000 bad requests, each on a connection of its own, as it is once an address has failed
- *headers*: 100 MB of header lines

For each attack: the number of attempts, how long it took, the median and the maximum time of the honest node's requests,
and by how much the memory of the gateway, of the SuperLink and of the process that holds the secret grew, and the logs.
"""

import argparse
import base64
import datetime
import http.client
import json
import logging
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mpunlearn.protocol.flower.keys import client_keys
from mpunlearn.protocol.flower.programs import free_port, kill_orphans, wait_for_port
from shapes import MODELS, build

PATH = "/v1/fleet/pull-messages"


class Honest(threading.Thread):
    """A registered node that asks for messages, and notes how long each answer takes."""

    def __init__(self, port: int, tls: ssl.SSLContext, key: Path) -> None:
        super().__init__(daemon=True)
        self._port, self._tls = port, tls
        private = serialization.load_ssh_private_key(key.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        self._key = private
        kind = serialization.PublicFormat.SubjectPublicKeyInfo
        pem = self._key.public_key().public_bytes(serialization.Encoding.PEM, kind)
        self._public = base64.b64encode(pem).decode()
        self.seconds: list[float] = []
        self.failed = 0

    def run(self) -> None:
        """Asks for ever, on a new connection each time, which is the harder case."""
        while True:
            begun = time.monotonic()
            try:
                status = self.ask()
            except OSError:
                status = 0
            if status in (0, 429, 503):
                self.failed += 1
            else:
                self.seconds.append(time.monotonic() - begun)
            time.sleep(0.05)

    def ask(self) -> int:
        """One request. The SuperLink answers 401, since it knows no such node: it has read and verified the request."""
        timestamp = datetime.datetime.now(datetime.UTC).isoformat()
        signature = base64.b64encode(self._key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))).decode()
        connection = http.client.HTTPSConnection("127.0.0.1", self._port, timeout=30, context=self._tls)
        headers = {"flwr-public-key": self._public, "flwr-timestamp": timestamp, "flwr-signature": signature}
        try:
            connection.request("POST", PATH, b"", {**headers, "content-type": "application/x-protobuf"})
            return connection.getresponse().status
        finally:
            connection.close()


class Stranger:
    """Connections from an address of this machine that the honest node does not use."""

    def __init__(self, port: int, tls: ssl.SSLContext) -> None:
        self._port, self._tls = port, tls
        self.network = 1
        """Each attack has addresses of its own, which have not failed yet."""

    def connect(self, number: int) -> ssl.SSLSocket:
        """A connection from the address with this number."""
        source = f"127.{self.network}.{number // 250}.{1 + number % 250}"
        raw = socket.create_connection(("127.0.0.1", self._port), 5, source_address=(source, 0))
        return self._tls.wrap_socket(raw, server_hostname="127.0.0.1")

    def slow(self) -> int:
        """Connections that say little and stay."""
        held = []
        for number in range(500):
            with suppress(OSError):
                held.append(self.connect(number // 8))
                held[-1].sendall(f"POST {PATH} HTTP/1.1\r\nX-Slow: ".encode())
        time.sleep(5)
        for connection in held:
            connection.close()
        return 500

    def bodies(self) -> int:
        """Bodies of a gigabyte, as far as they are taken."""
        block = bytes(1 << 20)
        for number in range(20):
            with suppress(OSError), self.connect(number) as connection:
                connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n".encode())
                for _ in range(1000):
                    connection.sendall(block)
        return 20

    def requests(self) -> int:
        """Bad requests from four addresses."""
        for number in range(100_000):
            with suppress(OSError), self.connect(number % 4) as connection:
                connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
                connection.recv(1000)
        return 100_000

    def headers(self) -> int:
        """Header lines without end: 20 times 5 MB."""
        lines = "".join(f"X-{n}: {'y' * 90}\r\n" for n in range(1000)).encode()
        for number in range(20):
            with suppress(OSError), self.connect(number) as connection:
                connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\n".encode())
                for _ in range(50):
                    connection.sendall(lines)
        return 20


def sizes(home: Path, server: psutil.Process) -> dict[str, float]:
    """Memory of the processes and size of the logs, in MB."""
    found = {"secret": server.memory_info().rss / 1e6}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(home.resolve()):
                name = process.environ().get("MPUNLEARN_PROGRAM", "other")
                found[name] = found.get(name, 0.0) + process.memory_info().rss / 1e6
    found["logs"] = sum(file.stat().st_size for file in home.glob("*.log*")) / 1e6
    return found


def main() -> None:
    """Prints one row for each attack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", default="slow,bodies,headers,requests", help="which attacks, separated by commas")
    wanted = parser.parse_args().attacks.split(",")
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        build(folder / "model", MODELS["tiny"])
        client_keys(folder / "client")
        command = [sys.executable, "-m", "mpunlearn.cli", "server", "start", "model", "--run", "run"]
        command += ["--trust", "client/client.json", "--port", str(port), "--objective", "npo"]
        server = subprocess.Popen(command, cwd=folder, stderr=(folder / "server.log").open("w"))
        try:
            wait_for_port(port, 120, "the gateway")
            while not (folder / "run" / "mail" / "alive").exists():
                time.sleep(0.5)
            time.sleep(5)
            attack(folder, port, psutil.Process(server.pid), wanted)
        finally:
            server.kill()
            kill_orphans(folder / "run" / "flower")


def attack(folder: Path, port: int, server: psutil.Process, wanted: list[str]) -> None:
    """Runs the attacks one after the other."""
    home = folder / "run" / "flower"
    ca = json.loads((folder / "run" / "invitation.json").read_text())["ca"]
    tls = ssl.create_default_context(cadata=ca)
    honest, stranger = Honest(port, tls, folder / "client" / "node.key"), Stranger(port, tls)
    honest.start()
    time.sleep(10)
    print(
        "| attack | attempts | s | median s | maximum s | failed | gateway +MB | SuperLink +MB | secret +MB | logs +MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    attacks: dict[str, Callable[[], int]] = {"none": lambda: time.sleep(10) or 0}  # type: ignore[func-returns-value]
    attacks |= {name: getattr(stranger, name) for name in wanted}
    for name, act in attacks.items():
        before, peak, begun, done = sizes(home, server), {}, time.monotonic(), threading.Event()  # type: ignore[var-annotated]
        honest.seconds, honest.failed = [], 0

        def watch(peak: dict[str, float] = peak, done: threading.Event = done) -> None:
            while not done.wait(0.5):
                for key, value in sizes(home, server).items():
                    peak[key] = max(peak.get(key, 0.0), value)

        watching = threading.Thread(target=watch)
        watching.start()
        stranger.network += 1
        attempts = act()
        seconds = time.monotonic() - begun
        done.set()
        watching.join()
        grown = {key: peak.get(key, value) - value for key, value in before.items()}
        print(
            f"| {name} | {attempts} | {seconds:.0f} | {statistics.median(honest.seconds):.3f} | {max(honest.seconds):.3f} "
            f"| {honest.failed} | {grown.get('the gateway', 0):.1f} | {grown.get('flower-superlink', 0):.1f} "
            f"| {grown['secret']:.1f} | {grown['logs']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
