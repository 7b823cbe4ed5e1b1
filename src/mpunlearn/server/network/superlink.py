"""Runs Flower on the server: a SuperLink, which nodes reach through the gateway, and the courier app inside it.

The courier touches MAIL/alive as a heartbeat. If the heartbeat stops for any reason, a new Flower run of the courier is
started. Should the old one still be alive, it finds a different generation in MAIL/generation and exits.
"""

import secrets
import socket
import subprocess
import time
from pathlib import Path

from mpunlearn.errors import NetworkError
from mpunlearn.files import write_bytes
from mpunlearn.protocol import flower
from mpunlearn.protocol.flower.keys import ClientKeys, certificates
from mpunlearn.protocol.flower.programs import (
    Program,
    environment,
    free_port,
    kill_orphans,
    script,
    wait_for_port,
)
from mpunlearn.server.network.folder import RunFolder
from mpunlearn.server.network.gateway import Gateway
from mpunlearn.server.plan import Service

APP = Path(flower.__file__).parent
"""Folder of the Flower app: pyproject.toml and the package `courier`."""
HEARTBEAT_TIMEOUT_SECONDS = 20.0
"""The courier is restarted after this long without a heartbeat."""
START_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 5.0
"""Time between two attempts to start a program."""


class SuperLink:
    """Flower on the server's machine.

    Args:
        folder: the run's directory.
        service: the address for nodes, and the keys of the nodes that may connect. Without keys there is no TLS, and
            any node on this machine may connect.
    """

    def __init__(self, folder: RunFolder, service: Service) -> None:
        self._folder, self._mail, self._clients, self._service = folder.flower, folder.mail, service.clients, service
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ca: str | None = None
        """CA certificate that clients must trust, in PEM format; None without TLS."""
        self._gateway: Gateway | None = None
        self._program: Program | None = None
        self._launched = self._retry_at = 0.0
        self._ready = service.superlink is not None
        options = ["--database", str(self._folder / "superlink.db"), "--disable-runtime-dependency-installation"]
        if service.superlink is not None:
            self._port, security = int(service.superlink.rpartition(":")[2]), "insecure = true"
        elif not service.clients:
            self._port, security = service.port, "insecure = true"
            options += ["--insecure", "--host", service.listen]
        else:
            self._port = free_port()
            ca, certificate, key = certificates(self._folder, service.host)
            self.ca, security = ca.read_text(), f'root-certificates = "{ca.resolve()}"'
            options += ["--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
            options += ["--enable-supernode-auth", "--host", "127.0.0.1"]
            self._gateway = Gateway(service.listen, service.port, self._port, ca, certificate, key)
        (self._folder / "config.toml").write_text(
            f'[superlink]\ndefault = "mpunlearn"\n\n[superlink.mpunlearn]\naddress = "127.0.0.1:{self._port}"\n{security}\n'
        )
        if service.superlink is None:
            command = ["flower-superlink", *options, "--port", str(self._port)]
            self._program = Program(command, self._folder / "superlink.log", self._folder)

    def start(self) -> None:
        """Starts the SuperLink, the courier and the gateway.

        Raises:
            NetworkError: Flower is not installed or does not start, or the port is in use.
        """
        if self._program is not None:
            kill_orphans(self._folder)
            check_port(self._service.listen, self._service.port)
        self.ensure_running()
        if self._gateway is not None:
            self._gateway.start()

    def ensure_running(self) -> None:
        """Restarts programs that have died.

        Raises:
            NetworkError: the restart failed; a call some seconds later tries again.
        """
        if self._program is not None and self._program.ensure_running():
            self._ready = False
        if time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + RETRY_SECONDS  # reset below if everything succeeds
        if not self._ready:
            name = f"Flower's SuperLink ({self._folder / 'superlink.log'})"
            wait_for_port(self._port, START_TIMEOUT_SECONDS, name)
            for client in self._clients:
                self._register(client)
            self._launched, self._ready = 0.0, True
        alive = self._mail / "alive"
        seen = max(self._launched, alive.stat().st_mtime if alive.exists() and self._launched else 0.0)
        if time.time() - seen > HEARTBEAT_TIMEOUT_SECONDS:
            self._launch()
        self._retry_at = 0.0

    def stop(self) -> None:
        """Stops the courier, the gateway and the SuperLink."""
        write_bytes(self._mail / "generation", b"none")
        if self._gateway is not None:
            self._gateway.stop()
        if self._program is not None:
            self._program.stop()

    def _launch(self) -> None:
        """Starts a new Flower run of the courier."""
        generation = secrets.token_hex(8)
        write_bytes(self._mail / "generation", generation.encode())
        config = f'mail="{self._mail.resolve()}" generation="{generation}"'
        self._flwr("run", str(APP), "mpunlearn", "-c", config)
        self._launched = time.time()

    def _register(self, client: ClientKeys) -> None:
        """Registers the node key of a client with the SuperLink, unless it is already registered."""
        file = self._folder / "node.pub"
        file.write_text(client.node + "\n")
        try:
            self._flwr("supernode", "register", str(file), "mpunlearn")
        except NetworkError as error:
            if "already" not in str(error):
                raise

    def _flwr(self, *arguments: str) -> None:
        try:
            done = subprocess.run(
                [script("flwr"), *arguments],
                env=environment(self._folder),
                capture_output=True,
                text=True,
                check=False,
                timeout=START_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise NetworkError(f"`flwr {arguments[0]}` did not finish in {START_TIMEOUT_SECONDS:g} s") from None
        with (self._folder / "flwr.log").open("a") as log:
            log.write(f"flwr {arguments[0]}: {done.returncode}\n{done.stdout}{done.stderr}\n")
        if done.returncode:
            raise NetworkError(f"`flwr {arguments[0]}` failed: {' '.join((done.stderr or done.stdout).split())[-400:]}")


def check_port(host: str, port: int) -> None:
    """Checks that no other program is listening on a port.

    Raises:
        NetworkError: the port is in use, or the address does not belong to this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise NetworkError(
            f"--port {port}: cannot listen on {host}:{port} ({error.strerror or error}); stop the program that uses "
            "it, or choose another --port"
        ) from None
