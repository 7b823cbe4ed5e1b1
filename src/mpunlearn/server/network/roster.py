"""Who takes part in a run: the clients, the nodes that carry for them, and who was dropped. Kept in clients.json.

A node is a Flower process; a client is a key. The server asks every node that it sees which client it carries messages for,
with a challenge that only the client's key can answer. If a client comes back with another node, that node replaces the old
one.
"""

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from mpunlearn.errors import MessageError, NetworkError
from mpunlearn.protocol.messages import Challenge, Hello
from mpunlearn.schema import read, write

RETRY_SECONDS = 10.0
"""How long a node is left alone after its answer to a challenge was refused."""


class LostClientError(NetworkError):
    """The run cannot go on without a client."""


@dataclass
class _Entries:
    """The content of clients.json."""

    clients: list[str]
    """Public keys, in the order of the clients' numbers."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Client → why the run goes on without it."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Node → the client that it carries for."""
    asked: dict[str, str] = field(default_factory=dict)
    """Node → the nonce of a challenge that it has not answered."""
    complete: float = 0.0
    """When the last client came, in seconds since the epoch; 0: not yet."""
    format: int = 1


class Roster:
    """Who takes part.

    Args:
        file: clients.json.
        trusted: public keys of the clients that may take part, in order; empty: whoever comes first.
        expected: number of clients.
    """

    def __init__(self, file: Path, trusted: list[str], expected: int) -> None:
        self._file, self._trusted, self._expected = file, trusted, expected
        self._entries = read(_Entries, file) if file.exists() else _Entries(list(trusted))
        self._refused: dict[str, float] = {}

    @property
    def clients(self) -> list[str]:
        """All clients that have come, in the order of their numbers; with `trusted`, all that are expected."""
        return list(self._entries.clients)

    @property
    def active(self) -> list[str]:
        """The clients that were not dropped."""
        return [client for client in self._entries.clients if client not in self._entries.dropped]

    @property
    def dropped(self) -> dict[str, str]:
        """Client → why the run goes on without it."""
        return dict(self._entries.dropped)

    @property
    def nodes(self) -> dict[str, str]:
        """Node → the client that it carries for."""
        return dict(self._entries.nodes)

    @property
    def complete_since(self) -> float | None:
        """When the last client came, in seconds since the epoch; None while clients are missing."""
        return self._entries.complete if len(self._entries.clients) >= self._expected else None

    def client_of(self, node: str) -> str | None:
        """The client that a node carries for."""
        return self._entries.nodes.get(node)

    def node_of(self, client: str) -> str | None:
        """The node that carries for a client."""
        return next((node for node, party in self._entries.nodes.items() if party == client), None)

    def pairs(self, assign: str, copies: int) -> list[tuple[str, int]]:
        """(client, copy) of every update that a round needs."""
        if assign == "one":
            return list(zip(self.active, range(1, copies + 1), strict=False))
        return [(client, copy) for client in self.active for copy in range(1, copies + 1)]

    def challenge(self, node: str, run: str) -> Challenge | None:
        """A challenge for a node, or None if it has answered one, has one to answer, or should be left alone for a while."""
        wait = time.monotonic() - self._refused.get(node, -RETRY_SECONDS) < RETRY_SECONDS
        if node in self._entries.nodes or node in self._entries.asked or wait:
            return None
        self._entries.asked[node] = secrets.token_hex(16)
        self._save()
        return Challenge(run, self._entries.asked[node], node)

    def enroll(self, hello: Hello, run: str, node: str, sender: str) -> list[str]:
        """Takes a client's answer to a challenge.

        Args:
            hello: the answer.
            run: this run's identifier.
            node: where it came from.
            sender: the key that signed it.

        Returns:
            The nodes that carried for this client before.

        Raises:
            MessageError: it answers another challenge, or the client does not belong to this run.
        """
        entries = self._entries
        if (hello.run, hello.node, hello.nonce) != (run, node, entries.asked.get(node)):
            raise MessageError("answers another challenge")
        if sender not in entries.clients:
            if self._trusted or len(entries.clients) >= self._expected:
                raise MessageError(f"client {sender[:16]} does not belong to this run")
            entries.clients.append(sender)
        before = [old for old, client in entries.nodes.items() if client == sender]
        for old in before:
            del entries.nodes[old]
        entries.nodes[node] = sender
        if len(entries.clients) == self._expected and not entries.complete:
            entries.complete = time.time()
        del entries.asked[node]
        self._save()
        return before

    def refuse_answer(self, node: str) -> None:
        """Forgets a node's challenge, after an answer that was no good; it gets another one a little later."""
        if self._entries.asked.pop(node, None) is not None:
            self._refused[node] = time.monotonic()
            self._save()

    def keep_challenges(self, nodes: set[str]) -> None:
        """Forgets the challenges of all other nodes, which were lost in a crash."""
        self._entries.asked = {node: nonce for node, nonce in self._entries.asked.items() if node in nodes}
        self._save()

    def drop(self, reasons: dict[str, str], quorum: int | None) -> None:
        """Goes on without some clients, for the rest of the run.

        Args:
            reasons: client → why.
            quorum: minimum number of clients that must be left; None: all of them.

        Raises:
            LostClientError: too few would be left; then nobody is dropped.
        """
        left = [client for client in self.active if client not in reasons]
        if quorum is None or len(left) < quorum:
            allowed = "every client" if quorum is None else f"at least {quorum} clients"
            named = "; ".join(f"client {client[:16]} {reason}" for client, reason in reasons.items())
            raise LostClientError(f"{named}; the plan needs {allowed}. Settle it with them, then run `server resume`")
        self._entries.dropped |= reasons
        self._save()

    def _save(self) -> None:
        write(self._file, self._entries)
