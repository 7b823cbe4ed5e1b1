"""Keys."""

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


class Identity:
    """A party's Ed25519 key pair.

    Args:
        key: the private key.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.public = raw.hex()
        """Public key, 64 hexadecimal digits: the party's name."""

    @classmethod
    def at(cls, path: Path) -> "Identity":
        """The key in a file of mode 0600, made there if there is none.

        Raises:
            StateError: the file is not a key, or others may read it.
        """
        if not path.exists():
            new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            write_bytes(new, os.urandom(32))
            with suppress(FileExistsError):  # another program of the same party was faster: its key counts
                os.link(new, path)
            new.unlink()
        raw = path.read_bytes()
        if len(raw) != 32:
            raise StateError(f"{path}: expected a key of 32 bytes, found {len(raw)}; restore it from a backup")
        if mode := path.stat().st_mode & 0o077:
            raise StateError(f"{path}: others may read the key (mode bits {mode:03o}); chmod 600 {path}")
        return cls(Ed25519PrivateKey.from_private_bytes(raw))

    def sign(self, body: str) -> str:
        """Signature over a body, hexadecimal."""
        return self._key.sign(body.encode()).hex()


def verify(body: str, key: str, signature: str) -> None:
    """Raises:
    MessageError: the signature over the body is not of that key.
    """
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), body.encode())
    except (InvalidSignature, ValueError, UnicodeError) as error:
        raise MessageError("the signature does not hold: not from who it says, or changed on the way") from error
