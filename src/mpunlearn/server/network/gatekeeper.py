"""Decides whom the gateway lets in, and how much each may send. It does no input or output.

The idea: what costs the server something is given to known nodes only, and everything else is counted. An *origin* is
an address that connections come from (for IPv6, a network of 64 bits, which is what one customer gets). Each origin has
a few failures to spend: a connection that ends without a valid signature costs one. Whoever has none left is turned
away before the handshake of TLS. Strangers, which are connections whose node is not known yet, are few in total; when
there are too many, the one that has been silent longest has to leave, so that a node that signs at once gets in.

A node is known by the signature in the headers of its request, which is checked before the first byte of the body is
read. The body may be as large as the run's plan makes it necessary, and so may all bodies of a node together.

Not covered: an attacker with thousands of addresses can still use up the bandwidth of the machine, and the time for
handshakes. Origins that a known node shares (behind one router) share their failures, too; they are forgiven faster.
"""

import base64
import datetime
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NODE_PATHS = "/v1/fleet/"
"""Path prefix of Flower's API for nodes."""
SMALL_BODIES = (
    "register-node",
    "activate-node",
    "deactivate-node",
    "unregister-node",
    "send-node-heartbeat",
    "pull-messages",
    "get-run",
    "get-fab",
    "pull-object",
    "confirm-message-received",
)
"""Requests that carry a few numbers and names."""
SMALL_BYTES = 64_000
LISTING_BYTES = 1_000_000
"""Maximum size of a `push-messages` request, which lists what `push-object` requests then carry."""
MAX_HEADER_BYTES = 16_000
MAX_HEADERS = 64
MAX_STRANGERS = 96
"""Connections of unknown nodes, in total. TLS takes about 0.3 MB for each."""
MAX_STRANGERS_PER_ORIGIN = 16
MAX_REQUESTS_PER_NODE = 8
"""Requests of a node that are in progress at the same time."""
MAX_ORIGINS = 4096
"""Origins whose failures are remembered."""
FAILURES = 30.0
FORGIVEN_PER_SECOND = 1.0
FORGIVEN_PER_SECOND_OF_KNOWN = 20.0
"""As above, for origins from which a known node came within `KNOWN_SECONDS`."""
KNOWN_SECONDS = 600.0
REQUESTS = 500.0
REQUESTS_PER_SECOND = 100.0
BYTES_PER_SECOND = 10_000.0
"""How fast a node gets back what it has used of its bytes: enough for the small messages that nodes exchange."""
SIGNATURE_SECONDS = 305.0
"""Maximum age of a signature, as Flower has it."""
CLOCK_SECONDS = 5.0


@dataclass
class Bucket:
    """An amount that is spent and comes back with time."""

    size: float
    per_second: float
    left: float = field(init=False)
    at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = self.size

    def spend(self, amount: float) -> bool:
        """Spends an amount if there is enough left."""
        self.refill()
        if amount > self.left:
            return False
        self.left -= amount
        return True

    def refill(self) -> None:
        """Adds what has come back since the last time."""
        now = time.monotonic()
        self.left = min(self.size, self.left + (now - self.at) * self.per_second)
        self.at = now


class RefusedError(Exception):
    """A request is refused.

    Args:
        status: the status of the answer.
        reason: a few words for the answer and the log.
        is_failure: whether it costs the origin a failure.
    """

    def __init__(self, status: int, reason: str, is_failure: bool = True) -> None:
        super().__init__(reason)
        self.status, self.reason, self.is_failure = status, reason, is_failure


class Origins:
    """Counts the connections and the failures of each origin."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, Bucket] = OrderedDict()
        self._known: OrderedDict[str, float] = OrderedDict()
        self._strangers: dict[str, int] = {}

    @staticmethod
    def of(host: str) -> str:
        """The origin of an address."""
        address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address):
            if address.ipv4_mapped is None:
                return str(ipaddress.ip_network((address, 64), strict=False))
            address = address.ipv4_mapped
        return str(address)

    def admit(self, origin: str) -> bool:
        """Whether an origin may open another connection; if so, `leave` must be called when its node is known or gone."""
        bucket = self._failures.get(origin)
        if bucket is not None:
            bucket.refill()
        if self._strangers.get(origin, 0) >= MAX_STRANGERS_PER_ORIGIN or (bucket is not None and bucket.left < 1):
            return False
        self._strangers[origin] = self._strangers.get(origin, 0) + 1
        return True

    def leave(self, origin: str) -> None:
        """Ends the time of a connection as a stranger."""
        self._strangers[origin] -= 1
        if not self._strangers[origin]:
            del self._strangers[origin]

    def fail(self, origin: str) -> None:
        """Counts a failure."""
        known = time.monotonic() - self._known.get(origin, -KNOWN_SECONDS) < KNOWN_SECONDS
        bucket = self._failures.setdefault(origin, Bucket(FAILURES, 0))
        bucket.per_second = FORGIVEN_PER_SECOND_OF_KNOWN if known else FORGIVEN_PER_SECOND
        bucket.refill()
        bucket.left = max(0.0, bucket.left - 1)
        self._failures.move_to_end(origin)
        if len(self._failures) > MAX_ORIGINS:
            self._failures.popitem(last=False)

    def know(self, origin: str) -> None:
        """Remembers that a known node came from an origin."""
        self._known[origin] = time.monotonic()
        self._known.move_to_end(origin)
        if len(self._known) > MAX_ORIGINS:
            self._known.popitem(last=False)


@dataclass
class Node:
    """A node whose key is registered, and what it has left."""

    key: ec.EllipticCurvePublicKey
    bytes: Bucket
    requests: Bucket = field(default_factory=lambda: Bucket(REQUESTS, REQUESTS_PER_SECOND))
    in_progress: int = 0


class Nodes:
    """The registered nodes.

    Args:
        keys: public keys, in OpenSSH format.
        max_message: maximum size of one object that a node sends, in bytes.
        max_total: what a node may send altogether before it has to wait, in bytes.
    """

    def __init__(self, keys: list[str], max_message: int, max_total: int) -> None:
        self._nodes: dict[str, Node] = {}
        for text in keys:
            key = serialization.load_ssh_public_key(text.encode())
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise ValueError(f"{text[:40]}: expected a key on an elliptic curve")
            pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            self._nodes[base64.b64encode(pem).decode()] = Node(key, Bucket(max_total, BYTES_PER_SECOND))
        self._limits = {NODE_PATHS + name: SMALL_BYTES for name in SMALL_BODIES}
        self._limits |= {NODE_PATHS + "push-messages": LISTING_BYTES, NODE_PATHS + "push-object": max_message}

    def examine(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[Node, int]:
        """Examines a request before its body is read; returns the node and the size of the body.

        Raises:
            RefusedError: it is not a request of a registered node, or more than the node may send.
        """
        limit = self._limits.get(path)
        if method != "POST" or limit is None:
            raise RefusedError(404, "not found")
        node = self._nodes.get(headers.get("flwr-public-key", ""))
        if node is None:
            raise RefusedError(401, "not a registered node")
        timestamp = headers.get("flwr-timestamp", "")
        try:
            age = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(timestamp)).total_seconds()
            signature = base64.b64decode(headers.get("flwr-signature", ""), validate=True)
            if not -CLOCK_SECONDS < age < SIGNATURE_SECONDS:
                raise ValueError("signed too long ago, or in the future")
            node.key.verify(signature, timestamp.encode(), ec.ECDSA(hashes.SHA256()))
        except (ValueError, TypeError, InvalidSignature):
            raise RefusedError(401, "no valid signature") from None
        length = headers.get("content-length", "")
        if not length.isascii() or not length.isdigit() or "transfer-encoding" in headers:
            raise RefusedError(411, "expected a body of known length")
        if len(length) > 12 or int(length) > limit:
            raise RefusedError(413, f"expected at most {limit} bytes")
        if node.in_progress >= MAX_REQUESTS_PER_NODE or not node.requests.spend(1):
            raise RefusedError(429, "too many requests", is_failure=False)
        if path.rpartition("/")[2].startswith("push-") and not node.bytes.spend(int(length)):
            raise RefusedError(429, "more bytes than the plan of the run needs", is_failure=False)
        return node, int(length)
