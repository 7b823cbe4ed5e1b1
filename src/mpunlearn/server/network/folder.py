"""The directory layout of a run over a network. All of it is private to the server.

RUN/plan.json              the plan of the run
RUN/identity.key           the server's Ed25519 private key
RUN/invitation.json        what clients need in order to connect
RUN/clients.json           the clients and their nodes (see `roster`)
RUN/state, RUN/round-N     the secret state, and θ between rounds (see `server.rounds`)
RUN/exchange/round-N/      copies, open jobs, accepted updates
RUN/mail/                  the courier's nodes, outbox and inbox
RUN/flower/                Flower's database, configuration, certificates and logs
RUN/status.json            progress, for `server status`
RUN/final                  the unlearned checkpoint
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run's directory."""

    path: Path

    @property
    def plan(self) -> Path:
        """The plan of the run."""
        return self.path / "plan.json"

    @property
    def identity(self) -> Path:
        """The server's private key."""
        return self.path / "identity.key"

    @property
    def roster(self) -> Path:
        """The clients and their nodes."""
        return self.path / "clients.json"

    @property
    def status(self) -> Path:
        """The progress of the run."""
        return self.path / "status.json"

    @property
    def invitation(self) -> Path:
        """The file that clients need in order to connect."""
        return self.path / "invitation.json"

    @property
    def flower(self) -> Path:
        """Flower's own files."""
        return self.path / "flower"

    @property
    def final(self) -> Path:
        """The unlearned checkpoint."""
        return self.path / "final"

    @property
    def mail(self) -> Path:
        """The folder of the courier, which exchanges messages with the nodes."""
        return self.path / "mail"

    @property
    def nodes(self) -> Path:
        """A file per node, touched whenever the courier sees the node."""
        return self.mail / "nodes"

    @property
    def inbox(self) -> Path:
        """Answers from nodes, as files NODE-NAME."""
        return self.mail / "inbox"

    @property
    def done(self) -> Path:
        """Tells the courier that the run is over."""
        return self.mail / "done"

    def outbox(self, node: str) -> Path:
        """Messages to be sent to a node."""
        return self.mail / "outbox" / node

    def exchange(self, number: int) -> Path:
        """Files of an open round."""
        return self.path / "exchange" / f"round-{number}"

    def copies(self, number: int) -> Path:
        """The published copies of a round."""
        return self.exchange(number) / "copies"

    def copy(self, number: int, copy: int) -> Path:
        """One published copy."""
        return self.copies(number) / f"copy-{copy}"

    def files(self, number: int) -> Path:
        """The files of the copies, and where clients can download them."""
        return self.exchange(number) / "files.json"

    def jobs(self, number: int) -> Path:
        """The open jobs."""
        return self.exchange(number) / "jobs"

    def updates(self, number: int, client: str) -> Path:
        """The accepted updates of a client."""
        return self.exchange(number) / "updates" / client

    def update(self, number: int, client: str, copy: int) -> Path:
        """One accepted update."""
        return self.updates(number, client) / f"copy-{copy}"

    def averages(self, number: int) -> Path:
        """The updates of each copy, averaged over clients."""
        return self.exchange(number) / "average"

    def make(self) -> None:
        """Creates the courier's folders."""
        for folder in (self.nodes, self.mail / "outbox", self.inbox):
            folder.mkdir(parents=True, exist_ok=True)
