"""Flower on the client's machine: a SuperNode that connects to the server and runs the courier on the spool folder."""

from pathlib import Path

from mpunlearn.protocol.flower.keys import Invitation
from mpunlearn.protocol.flower.programs import Program, free_port


class SuperNode:
    """The SuperNode process.

    Args:
        folder: folder for the certificate, the log and Flower's own files.
        spool: the spool folder, which the courier reads and writes.
        invitation: the server's address, and how it is authenticated.
        key: file with the node's private key.
    """

    def __init__(self, folder: Path, spool: Path, invitation: Invitation, key: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.log = folder / "supernode.log"
        command = ["flower-supernode", "--superlink", invitation.address, "--port", str(free_port())]
        command += ["--node-config", f'spool="{spool.resolve()}"']
        if invitation.ca is None:
            command += ["--insecure"]
        else:
            (folder / "ca.crt").write_text(invitation.ca)
            command += ["--root-certificates", str(folder / "ca.crt"), "--auth-supernode-private-key", str(key)]
        self._program = Program(command, self.log, folder)

    def ensure_running(self) -> bool:
        """Starts the node if it is not running; returns whether it was started.

        Raises:
            NetworkError: Flower is not installed.
        """
        return self._program.ensure_running()

    def stop(self) -> None:
        """Stops the node."""
        self._program.stop()
