"""The clients of a run, the nodes that relay messages for them, and dropped clients. Stored in clients.json.

A node is a Flower process; a client is identified by its public key. The server sends each new node a challenge, which
must be signed with a client's key. The answer shows which client the node relays messages for. If a client reconnects
through another node, the new node replaces the old one.
"""

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from mpunlearn.errors import MessageError, NetworkError
from mpunlearn.protocol.messages import Challenge, Hello
from mpunlearn.schema import read, write

RETRY_SECONDS = 10.0
"""How long to wait before challenging a node again after its answer was rejected."""


class LostClientError(NetworkError):
    """A client is lost, and the run cannot continue without it."""


@dataclass
class _Entries:
    """The content of clients.json."""

    clients: list[str]
    """Public keys, in the order of the clients' numbers."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Client → the reason why it was dropped."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Node → the client that it relays messages for."""
    asked: dict[str, str] = field(default_factory=dict)
    """Node → nonce of the challenge that it has not answered yet."""
    complete: float = 0.0
    """When the last client connected, in seconds since the epoch; 0 while clients are missing."""
    format: int = 1


class Roster:
    """The clients of a run and their nodes.

    Args:
        file: path of clients.json.
        trusted: public keys of the clients that may take part, in order; if empty, the first clients to connect are
            accepted.
        expected: number of clients.
    """

    def __init__(self, file: Path, trusted: list[str], expected: int) -> None:
        self._file, self._trusted, self._expected = file, trusted, expected
        self._entries = read(_Entries, file) if file.exists() else _Entries(list(trusted))
        self._refused: dict[str, float] = {}

    @property
    def clients(self) -> list[str]:
        """All clients that have connected, in the order of their numbers; with `trusted`, all expected clients."""
        return list(self._entries.clients)

    @property
    def active(self) -> list[str]:
        """The clients that were not dropped."""
        return [client for client in self._entries.clients if client not in self._entries.dropped]

    @property
    def dropped(self) -> dict[str, str]:
        """Client → the reason why it was dropped."""
        return dict(self._entries.dropped)

    @property
    def nodes(self) -> dict[str, str]:
        """Node → the client that it relays messages for."""
        return dict(self._entries.nodes)

    @property
    def complete_since(self) -> float | None:
        """When the last client connected, in seconds since the epoch; None while clients are missing."""
        return self._entries.complete if len(self._entries.clients) >= self._expected else None

    def client_of(self, node: str) -> str | None:
        """The client that a node relays messages for; None if it is not known."""
        return self._entries.nodes.get(node)

    def node_of(self, client: str) -> str | None:
        """The node that relays messages for a client; None if the client is not connected."""
        return next((node for node, party in self._entries.nodes.items() if party == client), None)

    def pairs(self, assign: str, copies: int) -> list[tuple[str, int]]:
        """(client, copy) of every update that a round needs."""
        if assign == "one":
            return list(zip(self.active, range(1, copies + 1), strict=False))
        return [(client, copy) for client in self.active for copy in range(1, copies + 1)]

    def challenge(self, node: str, run: str) -> Challenge | None:
        """Creates a challenge for a node; None if one is pending or answered, or if it is too early to try again."""
        wait = time.monotonic() - self._refused.get(node, -RETRY_SECONDS) < RETRY_SECONDS
        if node in self._entries.nodes or node in self._entries.asked or wait:
            return None
        self._entries.asked[node] = secrets.token_hex(16)
        self._save()
        return Challenge(run, self._entries.asked[node], node)

    def enroll(self, hello: Hello, run: str, node: str, sender: str) -> list[str]:
        """Processes a client's answer to a challenge, and assigns the node to the client.

        Args:
            hello: the answer.
            run: the identifier of this run.
            node: the node that delivered the answer.
            sender: the public key that signed the answer.

        Returns:
            The nodes that previously relayed messages for this client.

        Raises:
            MessageError: the answer is for another challenge, or the client does not belong to this run.
        """
        entries = self._entries
        if (hello.run, hello.node, hello.nonce) != (run, node, entries.asked.get(node)):
            raise MessageError("answers a different challenge")
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
        """Discards the challenge of a node after an invalid answer; the node is challenged again a little later."""
        if self._entries.asked.pop(node, None) is not None:
            self._refused[node] = time.monotonic()
            self._save()

    def keep_challenges(self, nodes: set[str]) -> None:
        """Discards the challenges of all other nodes, whose messages were lost in a crash."""
        self._entries.asked = {node: nonce for node, nonce in self._entries.asked.items() if node in nodes}
        self._save()

    def drop(self, reasons: dict[str, str], quorum: int | None) -> None:
        """Drops clients for the rest of the run.

        Args:
            reasons: client → the reason why it is dropped.
            quorum: minimum number of clients that must be left; None: no client may be dropped.

        Raises:
            LostClientError: too few clients would be left; in this case none is dropped.
        """
        left = [client for client in self.active if client not in reasons]
        if quorum is None or len(left) < quorum:
            allowed = "every client" if quorum is None else f"at least {quorum} clients"
            named = "; ".join(f"client {client[:16]} {reason}" for client, reason in reasons.items())
            raise LostClientError(f"{named}; the plan requires {allowed}; resolve this, then run `server resume`")
        self._entries.dropped |= reasons
        self._save()

    def _save(self) -> None:
        write(self._file, self._entries)
