"""Parties that sign events, and small records."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.record.artifacts import FileDigest
from mpunlearn.protocol.record.events import Event, SignedEvent

RUN = "0123456789abcdef" * 2
SERVER, CLIENT, STRANGER = (Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2, 3))


def event(
    signer: Identity = SERVER, kind="published", previous: SignedEvent | None = None, *after: SignedEvent, **changes
) -> SignedEvent:
    values = {
        "kind": kind,
        "run": RUN,
        "server": SERVER.public,
        "signer": signer.public,
        "created_at": "2026-11-25T12:00:00Z",
        "previous": previous.id if previous else "",
        "after": [one.id for one in after],
        "content": {"round": 1, "copy": 1},
        "files": [FileDigest("model.safetensors", "ab" * 32)],
        **changes,
    }
    return Event(**values).sign(signer)


def small_run() -> list[SignedEvent]:
    """One round with two copies."""
    copies = [event()]
    copies.append(event(SERVER, "published", copies[0], content={"round": 1, "copy": 2}))
    updates: list[SignedEvent] = []
    for number, copy in enumerate(copies, start=1):
        content = {"round": 1, "copy": number, "commitments": {"forget": "cd" * 32}}
        updates.append(event(CLIENT, "updated", updates[-1] if updates else None, copy, content=content))
    used = [{"copy": n, "digest": one.event.digest, "client": CLIENT.public} for n, one in enumerate(updates, start=1)]
    result = event(SERVER, "aggregated", copies[1], *updates, content={"round": 1, "updates": used})
    return [*copies, *updates, result]
