"""Flower on the client's machine: a SuperNode that connects to the server and runs the courier on the spool folder.

The courier is code that the server sends. Where the kernel has Landlock, the node and the courier can open nothing but
the spool and Flower's own folder, and other users of this machine cannot reach the node (see `protocol.flower.sandbox`).
"""

import secrets
from pathlib import Path

from mpunlearn.files import write_bytes
from mpunlearn.protocol.flower.keys import Invitation
from mpunlearn.protocol.flower.programs import PROXIES, Program, confined, free_port, is_listening

HINT = "Flower accepts a node only a minute after it was killed, and only if the server has this client's client.json"


class SuperNode:
    """The SuperNode and the SuperExec, which starts the courier.

    Args:
        folder: folder for the certificate, the log and Flower's own files.
        spool: the spool folder, which the courier reads and writes.
        invitation: the server's address, and how it is authenticated.
        key: file with the node's private key.

    Raises:
        NetworkError: Flower is not installed.
    """

    def __init__(self, folder: Path, spool: Path, invitation: Invitation, key: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.log = folder / "supernode.log"
        port, secret = free_port(), folder / "superexec.key"
        write_bytes(secret, secrets.token_bytes(32))
        between = ["--superexec-auth-secret-file", str(secret)]
        node = ["--superlink", invitation.address, "--port", str(port), "--isolation", "process", *between]
        node += ["--node-config", f'spool="{spool.resolve()}"']
        if invitation.ca is None:
            node += ["--insecure"]
        else:
            (folder / "ca.crt").write_text(invitation.ca)
            node += ["--root-certificates", str(folder / "ca.crt"), "--auth-supernode-private-key", str(key)]
        run = ["--insecure", "--runtime-api-address", f"127.0.0.1:{port}", *between]
        link = confined("flower-supernode", node, read=[key], write=[folder])
        executor = confined("flower-superexec", run, read=[], write=[folder, spool])
        self._port = port
        self._node = Program("flower-supernode", link, self.log, folder, PROXIES, HINT)
        self._executor = Program("flower-superexec", executor, folder / "superexec.log", folder)
        self._is_listening = False

    def ensure_running(self) -> bool:
        """Starts the programs that are not running; returns whether any was started.

        The SuperExec is started when the node is listening, since one that finds nobody waits longer and longer.
        """
        started = self._node.ensure_running()
        self._is_listening = self._is_listening or is_listening(self._port)
        return (self._is_listening and self._executor.ensure_running()) or started

    def stop(self) -> None:
        """Stops the programs."""
        for program in (self._node, self._executor):
            program.stop()
