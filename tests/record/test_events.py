"""One signed event: readable by other tools, and not changeable by anyone."""

import base64
import copy
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from tests.record.signers import CLIENT, SERVER, STRANGER, event

from mpunlearn.errors import RecordError, SchemaError
from mpunlearn.protocol.record.events import SignedEvent, fingerprint

ENVELOPE = event().envelope


def test_the_envelope_is_dsse_around_an_in_toto_statement() -> None:
    """Verified as the DSSE specification says, without the library that signed it."""
    payload, kind = base64.b64decode(ENVELOPE["payload"]), ENVELOPE["payloadType"]
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    signature = base64.b64decode(ENVELOPE["signatures"][0]["sig"])
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(SERVER.public)).verify(signature, signed)
    statement = json.loads(payload)
    assert kind == "application/vnd.in-toto+json"
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "model.safetensors", "digest": {"sha256": "ab" * 32}}]
    assert ENVELOPE["signatures"][0]["keyid"] == fingerprint(SERVER.public)


def test_an_event_reads_back_the_same() -> None:
    opened = SignedEvent.open(ENVELOPE)
    assert opened == event()
    assert opened.id == event().id
    assert SignedEvent.open(json.loads(json.dumps(ENVELOPE))).id == opened.id


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_byte_of_an_envelope_can_be_changed(place, flip) -> None:
    data = bytearray(json.dumps(ENVELOPE).encode())
    data[place % len(data)] ^= flip
    try:
        changed = json.loads(data)
    except ValueError:
        return
    if changed != ENVELOPE:
        with pytest.raises(RecordError):
            SignedEvent.open(changed)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_byte_of_a_statement_can_be_changed(place, flip) -> None:
    payload = bytearray(base64.b64decode(ENVELOPE["payload"]))
    payload[place % len(payload)] ^= flip
    with pytest.raises(RecordError):
        SignedEvent.open({**ENVELOPE, "payload": base64.b64encode(payload).decode()})


def test_nobody_signs_for_another() -> None:
    with pytest.raises(ValueError, match="own signer"):
        event(CLIENT, "updated").event.sign(STRANGER)
    forged = copy.deepcopy(event(CLIENT, "updated").envelope)
    forged["signatures"] = event(STRANGER, "updated").envelope["signatures"]
    with pytest.raises(RecordError):
        SignedEvent.open(forged)
    forged["signatures"][0]["keyid"] = fingerprint(CLIENT.public)
    with pytest.raises(RecordError, match="signature"):
        SignedEvent.open(forged)


@pytest.mark.parametrize("kind", ["published", "aggregated"])
def test_only_the_server_publishes_and_aggregates(kind) -> None:
    event(SERVER, kind)
    with pytest.raises(SchemaError, match="must be signed by the server"):
        event(CLIENT, kind)


@pytest.mark.parametrize(
    "envelope", [None, [], {}, "x", {**ENVELOPE, "payload": 3}, {**ENVELOPE, "more": 1}, {**ENVELOPE, "signatures": []}]
)
def test_whatever_is_not_an_event_is_refused(envelope) -> None:
    with pytest.raises(RecordError):
        SignedEvent.open(envelope)


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "x"},
        {"created_at": "today"},
        {"previous": "x"},
        {"files": []},
        {"kind": "other"},
        {"content": {"a": 1.5}},
    ],
)
def test_events_with_invalid_fields_cannot_be_made(changes) -> None:
    if "previous" in changes:
        changes = {"after": ["x"]}
        with pytest.raises((SchemaError, AttributeError)):
            event(**changes)
        return
    with pytest.raises((SchemaError, RecordError)):
        SignedEvent.open(event(**changes).envelope)
