"""The Ed25519 key pair (RFC 8032) of a party. It signs the party's messages; the public key identifies the party."""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mpunlearn.errors import MessageError, StateError
from mpunlearn.files import write_bytes

HEX = re.compile(r"[0-9a-f]{64}")
"""Matches a hexadecimal public key or SHA-256."""
KEY_BYTES = 32


class Identity:
    """The key pair of a party.

    Args:
        key: the private key.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.key = key
        """The private key."""
        raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.public = raw.hex()
        """The public key, 64 hexadecimal digits."""

    @classmethod
    def at(cls, path: Path) -> "Identity":
        """Reads the private key from a file of mode 0600, or generates it if the file does not exist.

        Raises:
            StateError: the file is not a key, or other users can read it.
        """
        if not path.exists():
            new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            write_bytes(new, os.urandom(KEY_BYTES))
            with suppress(FileExistsError):  # another program of the same party created the key first
                os.link(new, path)
            new.unlink()
        raw = path.read_bytes()
        if len(raw) != KEY_BYTES:
            raise StateError(f"{path}: expected a key of {KEY_BYTES} bytes, found {len(raw)}; restore it from a backup")
        if mode := path.stat().st_mode & 0o077:
            raise StateError(f"{path}: other users can read the key (mode bits {mode:03o}); run `chmod 600 {path}`")
        return cls(Ed25519PrivateKey.from_private_bytes(raw))

    def sign(self, body: str) -> str:
        """Signs a message body; returns the signature, hexadecimal."""
        return self.key.sign(body.encode()).hex()


def verify(body: str, key: str, signature: str) -> None:
    """Verifies a signature.

    Args:
        body: the signed text.
        key: the public key, 64 hexadecimal digits.
        signature: the signature, hexadecimal.

    Raises:
        MessageError: the signature is not valid for this body and key.
    """
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), body.encode())
    except (InvalidSignature, ValueError, UnicodeError) as error:
        raise MessageError("invalid signature: the message was forged, or was modified in transit") from error
