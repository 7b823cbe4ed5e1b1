"""Runs Flower on the server: a SuperLink, a SuperExec, the courier app inside it, and the gateway in front of them.

The SuperLink listens on the loopback address and turns other users of this machine away, since its control interface
authenticates nobody. None of these programs can open the run's secrets: each is confined to Flower's folder, and the
courier to the mail folder as well (see `protocol.flower.sandbox`). The gateway is the only way in from outside.

Each program is watched. The courier touches MAIL/alive as a heartbeat. If the heartbeat stops for any reason, a new
Flower run of the courier is started. Should the old one still be alive, it finds a different generation in
MAIL/generation and exits. If several new runs show no heartbeat either, Flower's programs are restarted.
"""

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import NetworkError, PlanError
from mpunlearn.files import write_bytes, write_json
from mpunlearn.progress import say
from mpunlearn.protocol import flower
from mpunlearn.protocol.flower import sandbox
from mpunlearn.protocol.flower.courier.spool import MAX_MESSAGE_BYTES
from mpunlearn.protocol.flower.keys import ClientKeys, certificates
from mpunlearn.protocol.flower.programs import (
    MAX_FAILURES,
    Program,
    confined,
    environment,
    free_port,
    kill_orphans,
    limit_log,
    script,
    wait_for_port,
)
from mpunlearn.protocol.messages import MAX_HEADER_BYTES, MAX_INLINE_BYTES
from mpunlearn.server.network.folder import RunFolder
from mpunlearn.server.network.jobs import MAX_ATTEMPTS
from mpunlearn.server.plan import RunPlan, Service

APP = Path(flower.__file__).parent
"""Folder of the Flower app: pyproject.toml and the package `courier`."""
HEARTBEAT_TIMEOUT_SECONDS = 20.0
"""The courier is restarted after this long without a heartbeat."""
START_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 5.0
"""Time between two attempts to start a program."""
WATCH_SECONDS = 0.2


class SuperLink:
    """Flower on the server's machine.

    Args:
        folder: the run's directory.
        plan: the run's plan, with a `Service`: the address for nodes, and the keys of the nodes that may connect.
            Without keys there is no TLS, and any node of this user on this machine may connect.

    Raises:
        NetworkError: Flower is not installed.
        PlanError: this system cannot keep other users away from Flower.
    """

    def __init__(self, folder: RunFolder, plan: RunPlan) -> None:
        assert plan.service is not None
        service = plan.service
        self._folder, self._mail, self._clients, self._service = folder.flower, folder.mail, service.clients, service
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ca: str | None = None
        """CA certificate that clients must trust, in PEM format; None without TLS."""
        self._programs: dict[str, Program] = {}
        self._launched = self._retry_at = 0.0
        self._silent_launches = 0
        self._ready = service.superlink is not None
        self._stopping, self._watch = threading.Event(), threading.Thread(target=self._keep_running, daemon=True)
        if service.superlink is not None:
            self._port, security = int(service.superlink.rpartition(":")[2]), "insecure = true"
        else:
            _check_system(service)
            self._port = free_port() if service.clients else service.port
            security = self._set_up(plan, service)
        (self._folder / "config.toml").write_text(
            f'[superlink]\ndefault = "mpunlearn"\n\n[superlink.mpunlearn]\naddress = "127.0.0.1:{self._port}"\n{security}\n'
        )

    def _set_up(self, plan: RunPlan, service: Service) -> str:
        """Defines the programs; returns how users of the SuperLink are to connect, for config.toml."""
        key, home = self._folder / "superexec.key", self._folder
        write_bytes(key, secrets.token_bytes(32))
        link = ["--database", str(home / "superlink.db"), "--disable-runtime-dependency-installation"]
        link += ["--isolation", "process", "--superexec-auth-secret-file", str(key), "--port", str(self._port)]
        run = ["--runtime-api-address", f"127.0.0.1:{self._port}", "--superexec-auth-secret-file", str(key)]
        security = "insecure = true"
        if service.clients:
            ca, certificate, private = certificates(home, service.host)
            self.ca, security = ca.read_text(), f'root-certificates = "{ca.resolve()}"'
            link += ["--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(private)]
            link += ["--enable-supernode-auth", "--host", "127.0.0.1"]
            run += ["--root-certificates", str(ca)]
            max_message, max_total = message_limits(plan)
            settings = {
                "host": service.listen,
                "port": service.port,
                "upstream": self._port,
                "ca": str(ca.resolve()),
                "certificate": str(certificate.resolve()),
                "key": str(private.resolve()),
                "nodes": [client.node for client in service.clients],
                "max_message": max_message,
                "max_total": max_total,
            }
            write_json(home / "gateway.json", settings, mode=0o600)
            gateway = [sys.executable, "-P", "-m", "mpunlearn.server.network.gateway", str(home / "gateway.json")]
            self._programs["gateway"] = Program("the gateway", gateway, home / "gateway.log", home)
        else:
            link += ["--insecure", "--host", service.listen]
            run += ["--insecure"]
        commands = {
            "flower-superlink": confined("flower-superlink", link, read=[], write=[home]),
            "flower-superexec": confined("flower-superexec", run, read=[], write=[home, self._mail]),
        }
        script("flwr")
        for name, command in commands.items():
            self._programs[name] = Program(name, command, home / f"{name.removeprefix('flower-')}.log", home)
        return security

    def start(self) -> None:
        """Starts all programs and watches them from now on.

        Raises:
            NetworkError: the port is in use.
        """
        if self._programs:
            kill_orphans(self._folder)
            check_port(self._service.listen, self._service.port)
        with suppress(NetworkError):  # the watch tries again, and says so if that fails, too
            self.ensure_running()
        self._watch.start()

    def ensure_running(self) -> None:
        """Restarts programs that have died or show no sign of life.

        Raises:
            NetworkError: the restart failed; a call some seconds later tries again.
        """
        started = {
            name
            for name, program in self._programs.items()
            if (self._ready or name != "flower-superexec") and program.ensure_running()
        }
        if "flower-superlink" in started:
            self._ready = False
        if "flower-superexec" in started:
            self._launched = 0.0  # the courier has died with it
        if time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + RETRY_SECONDS  # reset below if everything succeeds
        if not self._ready:
            name = f"Flower's SuperLink ({self._folder / 'superlink.log'})"
            wait_for_port(self._port, START_TIMEOUT_SECONDS, name)
            if self._programs:  # only now, since a SuperExec that finds nobody waits longer and longer
                self._programs["flower-superexec"].ensure_running()
            for client in self._clients:
                self._register(client)
            self._launched, self._ready = 0.0, True
        alive = self._mail / "alive"
        beat = alive.stat().st_mtime if alive.exists() and self._launched else 0.0
        if beat > self._launched:
            self._silent_launches = 0
        if time.time() - max(self._launched, beat) > HEARTBEAT_TIMEOUT_SECONDS:
            self._launch()
        self._retry_at = 0.0

    def stop(self) -> None:
        """Stops the courier, the gateway and the SuperLink."""
        self._stopping.set()
        if self._watch.is_alive():
            self._watch.join(START_TIMEOUT_SECONDS)
        write_bytes(self._mail / "generation", b"none")
        for program in self._programs.values():
            program.stop()

    def _keep_running(self) -> None:
        """Watches the programs until the run ends, also while the coordinator is busy."""
        trouble, times = "", 0
        while not self._stopping.wait(WATCH_SECONDS):
            try:
                self.ensure_running()
            except (NetworkError, OSError) as error:  # problems with Flower do not end the run
                times = times + 1 if str(error) == trouble else 1
                trouble = str(error)
                if times == MAX_FAILURES:
                    say(f"{error}; tried {times} times; see {self._folder}/*.log and resolve it; retrying")

    def _launch(self) -> None:
        """Starts a new Flower run of the courier."""
        self._silent_launches += 1
        if self._silent_launches > MAX_FAILURES:
            say(
                f"the courier has shown no sign of life after {MAX_FAILURES} starts; restarting Flower; if this is repeated, "
                f"see {self._folder}/*.log for the reason and resolve it"
            )
            self._silent_launches = 0
            for name in self._programs.keys() - {"gateway"}:
                self._programs[name].stop()
            return
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
                confined("flwr", arguments, read=[APP], write=[self._folder]),
                env=environment(self._folder),
                capture_output=True,
                text=True,
                check=False,
                timeout=START_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise NetworkError(f"`flwr {arguments[0]}` did not finish in {START_TIMEOUT_SECONDS:g} s") from None
        limit_log(self._folder / "flwr.log")
        with (self._folder / "flwr.log").open("a") as log:
            log.write(f"flwr {arguments[0]}: {done.returncode}\n{done.stdout}{done.stderr}\n")
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[-400:] or f"exit code {done.returncode}"
            raise NetworkError(f"`flwr {arguments[0]}` failed: {said}")


def message_limits(plan: RunPlan) -> tuple[int, int]:
    """How large one message of a client may be, and all its messages together, in bytes.

    A client answers every copy of every round, in up to `MAX_ATTEMPTS` attempts; each answer may get lost on the way
    once. Without a store, an answer holds an update.
    """
    assert plan.service is not None
    update = 0
    if plan.service.federation.store is None:
        tensors = Checkpoint(plan.checkpoint).tensors.values()
        update = min(MAX_INLINE_BYTES, 4 * sum(info.nbytes // info.dtype.itemsize for info in tensors) + 10_000_000)
    answer = MAX_HEADER_BYTES + update
    copies = plan.perturbation.copies
    return max(
        answer, min(MAX_MESSAGE_BYTES, copies * answer)
    ) + 100_000, 2 * plan.rounds * copies * MAX_ATTEMPTS * answer


def _check_system(service: Service) -> None:
    """Checks that this system can keep other users, and strangers' bytes, away from the secret.

    Raises:
        PlanError: it cannot keep other users away from Flower's control interface.
    """
    if service.clients and not sandbox.knows_owners():
        raise PlanError(
            f"{sys.platform}: the system does not say which user a local connection belongs to, so any user of this machine "
            "could start programs in Flower; run the server on Linux, or in a container"
        )
    if not sandbox.version():
        say(
            "warning: this system has no Landlock (Linux 5.13), so Flower's programs and the gateway run with all file "
            f"permissions of user {os.getuid()}; use a machine or container for this run alone"
        )


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
