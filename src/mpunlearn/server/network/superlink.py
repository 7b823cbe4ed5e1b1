"""The server's Flower: a SuperLink that nodes reach through the gateway, and the courier that runs in it.

The courier says in MAIL/alive that it is alive. When it has not for a while, whatever the reason, another Flower run is
started and takes over: the first finds another generation in MAIL/generation and ends.
"""

import secrets
import subprocess
import time
from pathlib import Path

from mpunlearn.errors import NetworkError
from mpunlearn.files import write_bytes
from mpunlearn.protocol import flower
from mpunlearn.protocol.flower.keys import ClientKeys, certificates
from mpunlearn.protocol.flower.programs import Program, environment, free_port, script, wait_for_port
from mpunlearn.server.network.gateway import Gateway

APP = Path(flower.__file__).parent
"""The Flower app: this folder's pyproject.toml and `courier`."""
HEARTBEAT_TIMEOUT_SECONDS = 20.0
"""Seconds without a sign of life after which the courier is started again."""
START_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 5.0
"""Seconds between two attempts to start something."""


class SuperLink:
    """Flower on the server's machine.

    Args:
        folder: for Flower's database, configuration, certificates and log.
        mail: the folder that the courier carries for.
        host: address that nodes know.
        listen: address to listen on.
        port: port for nodes.
        clients: keys of the nodes that may connect; None: no TLS and no keys, any node of this machine may.
        attached: HOST:PORT of a SuperLink that runs already, without TLS on this machine, instead of one of our own.
    """

    def __init__(
        self,
        folder: Path,
        mail: Path,
        host: str,
        listen: str,
        port: int,
        clients: list[ClientKeys] | None,
        attached: str | None = None,
    ) -> None:
        self._folder, self._mail, self._clients = folder, mail, clients
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ca: str | None = None
        self._gateway: Gateway | None = None
        self._program: Program | None = None
        self._launched = self._again = 0.0
        self._ready = attached is not None
        options = ["--database", str(folder / "superlink.db"), "--disable-runtime-dependency-installation"]
        if attached is not None:
            self._port, security = int(attached.rpartition(":")[2]), "insecure = true"
        elif clients is None:
            self._port, security = port, "insecure = true"
            options += ["--insecure", "--host", listen]
        else:
            self._port = free_port()
            ca, certificate, key = certificates(folder, host)
            self.ca, security = ca.read_text(), f'root-certificates = "{ca.resolve()}"'
            options += ["--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
            options += ["--enable-supernode-auth", "--host", "127.0.0.1"]
            self._gateway = Gateway(listen, port, self._port, ca, certificate, key)
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "mpunlearn"\n\n[superlink.mpunlearn]\naddress = "127.0.0.1:{self._port}"\n{security}\n'
        )
        if attached is None:
            command = ["flower-superlink", *options, "--port", str(self._port)]
            self._program = Program(command, folder / "superlink.log", folder)

    def start(self) -> None:
        """Raises:
        NetworkError: Flower is not installed, or does not start.
        """
        self.ensure_running()
        if self._gateway is not None:
            self._gateway.start()

    def ensure_running(self) -> None:
        """Starts again whatever has died.

        Raises:
            NetworkError: that failed; it is tried again some seconds later.
        """
        if self._program is not None and self._program.ensure_running():
            self._ready = False
        if time.monotonic() < self._again:
            return
        self._again = time.monotonic() + RETRY_SECONDS  # unless all goes well
        if not self._ready:
            wait_for_port(self._port, START_TIMEOUT_SECONDS, f"Flower's SuperLink ({self._folder / 'superlink.log'})")
            for client in self._clients or []:
                self._register(client)
            self._launched, self._ready = 0.0, True
        alive = self._mail / "alive"
        seen = max(self._launched, alive.stat().st_mtime if alive.exists() and self._launched else 0.0)
        if time.time() - seen > HEARTBEAT_TIMEOUT_SECONDS:
            self._launch()
        self._again = 0.0

    def stop(self) -> None:
        """Ends the courier, the gateway and the SuperLink."""
        write_bytes(self._mail / "generation", b"none")
        if self._gateway is not None:
            self._gateway.stop()
        if self._program is not None:
            self._program.stop()

    def _launch(self) -> None:
        """A new Flower run of the courier."""
        generation = secrets.token_hex(8)
        write_bytes(self._mail / "generation", generation.encode())
        config = f'mail="{self._mail.resolve()}" generation="{generation}"'
        self._flwr("run", str(APP), "mpunlearn", "-c", config)
        self._launched = time.time()

    def _register(self, client: ClientKeys) -> None:
        """Lets a node connect; one that may already is no error."""
        file = self._folder / "node.pub"
        file.write_text(client.node + "\n")
        try:
            self._flwr("supernode", "register", str(file), "mpunlearn")
        except NetworkError as error:
            if "already" not in str(error):
                raise

    def _flwr(self, *arguments: str) -> None:
        command = [script("flwr"), *arguments]
        try:
            done = subprocess.run(
                command,
                env=environment(self._folder),
                capture_output=True,
                text=True,
                check=False,
                timeout=START_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise NetworkError(f"`flwr {arguments[0]}` has not answered in {START_TIMEOUT_SECONDS:g} s") from None
        with (self._folder / "flwr.log").open("a") as log:
            log.write(f"flwr {arguments[0]}: {done.returncode}\n{done.stdout}{done.stderr}\n")
        if done.returncode:
            raise NetworkError(f"`flwr {arguments[0]}` failed: {' '.join((done.stderr or done.stdout).split())[-400:]}")
