"""Verifies records of the Pith open graph, as far as their format is public.

A record's number is formed like ours. Its signature, the *receipt*, is Ed25519 over the 32 bytes of the SHA-256 of the
canonical record. How the ids and signatures of Pith's events are formed is not published, so events are counted but not
verified.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from mpunlearn.errors import RecordError
from mpunlearn.protocol.record.canonical import digest, number

BUNDLE_TYPE = "pith_open_graph_bundle"
_ALIAS = re.compile(r"pith:(\d{4}:)?([A-Z2-7]{8}|[A-Z2-7]{12}|[A-Z2-7]{16}|[A-Z2-7]{26})")


def problems_of(bundle: Mapping[str, Any], public_key: str | None = None) -> list[str]:
    """What is wrong with a bundle's record, number, aliases and receipt; empty if nothing is.

    Args:
        bundle: the content of a bundle.json.
        public_key: Ed25519 public key in base64, to verify the receipt with.
    """
    found = []
    try:
        sha256 = digest(bundle.get("canonical_record"))
    except RecordError as error:
        return [f"canonical_record: {error}"]
    expected = {"canonical_sha256": sha256, "pith_number": number(sha256), "short_pith_number": number(sha256)[:8]}
    for name, value in expected.items():
        given = bundle.get(name)
        if given != value and not (name == "short_pith_number" and given in (None, f"pith:{value}")):
            found.append(f"{name}: expected {value} from the canonical record, found {given!r:.80}")
    for alias in bundle.get("source_aliases") or []:
        value = str(alias.get("alias_value") if isinstance(alias, Mapping) else alias)
        if value.startswith("pith:"):
            match = _ALIAS.fullmatch(value)
            if match is None or not number(sha256).startswith(match[2]):
                found.append(f"source_aliases: {value!r:.80} is not a form of {number(sha256)}")
    receipt = bundle.get("receipt")
    if isinstance(receipt, Mapping):
        if public_key is None:
            found.append("receipt: give --public-key to verify it")
        elif not signature_valid(sha256, str(receipt.get("signature_b64")), public_key):
            found.append(f"receipt: not a signature of the record by the key {public_key:.16}…")
    return found


def signature_valid(sha256: str, signature: str, public_key: str) -> bool:
    """Whether a signature (base64) of a record, given by its SHA-256 (hex), is that of a public key (base64)."""
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key, validate=True))
        key.verify(base64.b64decode(signature, validate=True), bytes.fromhex(sha256))
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True
