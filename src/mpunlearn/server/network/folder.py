"""Where everything of a served run is. All of it belongs to the server; what must outlive the process is in files.

RUN/plan.json              the plan, pinned
RUN/identity.key           the server's Ed25519 key
RUN/clients.json           who takes part: `roster`
RUN/state, RUN/round-N     the secret state, and θ between rounds: `server.rounds`
RUN/exchange/round-N/      copies, jobs that are open, updates that were accepted
RUN/mail/                  nodes, outbox, inbox: the courier's
RUN/flower/                Flower's database, configuration, certificates and logs
RUN/status.json            for people
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
        """The pinned plan."""
        return self.path / "plan.json"

    @property
    def identity(self) -> Path:
        """The server's private key."""
        return self.path / "identity.key"

    @property
    def roster(self) -> Path:
        """Who takes part."""
        return self.path / "clients.json"

    @property
    def status(self) -> Path:
        """How far the run is."""
        return self.path / "status.json"

    @property
    def invitation(self) -> Path:
        """What clients need in order to connect."""
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
        """The courier's folder."""
        return self.path / "mail"

    @property
    def nodes(self) -> Path:
        """A file for each node that the courier has seen, touched whenever it sees it."""
        return self.mail / "nodes"

    @property
    def inbox(self) -> Path:
        """What came back, NODE-NAME."""
        return self.mail / "inbox"

    @property
    def done(self) -> Path:
        """Tells the courier that the run is over."""
        return self.mail / "done"

    def outbox(self, node: str) -> Path:
        """What is to be sent to a node."""
        return self.mail / "outbox" / node

    def exchange(self, number: int) -> Path:
        """Everything of a round that is open."""
        return self.path / "exchange" / f"round-{number}"

    def copies(self, number: int) -> Path:
        """The published copies of a round."""
        return self.exchange(number) / "copies"

    def copy(self, number: int, copy: int) -> Path:
        """One published copy."""
        return self.copies(number) / f"copy-{copy}"

    def files(self, number: int) -> Path:
        """What the copies' files are, and where clients get them."""
        return self.exchange(number) / "files.json"

    def jobs(self, number: int) -> Path:
        """The jobs that are open."""
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
