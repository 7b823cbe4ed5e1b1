"""Salted commitments to texts: a party commits to them without showing any, and can later prove that one was among them.

Each text gets a random salt of 32 bytes and a leaf

    leaf = SHA-256(0x00 ‖ salt ‖ SHA-256(text))        node = SHA-256(0x01 ‖ left ‖ right)

The leaves are hashed pairwise up to one root, as in RFC 9162 (Certificate Transparency), section 2.1.1. Only the root is
published. Without a salt nobody can test a guess of a text, and not even the number of texts shows. To *open* a text is
to give the text, its salt and the hashes beside the path from its leaf to the root.

The salts are kept in COMMITMENTS.json, which is private to the party. Without that file nothing can be opened.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpunlearn import schema
from mpunlearn.errors import RecordError, SchemaError, StateError
from mpunlearn.files import file_digest, write_bytes
from mpunlearn.protocol.identity import HEX
from mpunlearn.protocol.record.canonical import file_bytes

FILE = "commitments.json"
PLAN = "plan"
"""Name of the set with one element, the bytes of the party's plan file."""


@dataclass(frozen=True)
class Leaf:
    """One committed text."""

    salt: str
    """32 random bytes, hexadecimal."""
    sha256: str
    """SHA-256 of the text."""

    def __post_init__(self) -> None:
        if not (HEX.fullmatch(self.salt) and HEX.fullmatch(self.sha256)):
            raise SchemaError("Leaf: expected a salt of 32 bytes and a SHA-256, both hexadecimal")

    @classmethod
    def of(cls, sha256: str) -> "Leaf":
        """A leaf with a new salt."""
        return cls(secrets.token_hex(32), sha256)

    @property
    def hash(self) -> bytes:
        """The hash of the leaf."""
        return hashlib.sha256(b"\0" + bytes.fromhex(self.salt) + bytes.fromhex(self.sha256)).digest()


@dataclass(frozen=True)
class Opening:
    """Proves that a text is in a committed set."""

    text: str
    salt: str
    index: int
    """Position in the set, starting at 0."""
    size: int
    """Number of texts in the set."""
    path: list[str]
    """Hashes of the nodes beside the path to the root, from the leaf upwards, hexadecimal."""

    def root(self) -> str:
        """The root (hex) that this opening leads to (RFC 9162, section 2.1.3.2).

        Raises:
            RecordError: the path does not fit the position and the size.
        """
        node, first, last = Leaf(self.salt, text_digest(self.text)).hash, self.index, self.size - 1
        for sibling in self.path:
            if last <= 0 or not HEX.fullmatch(sibling):
                raise RecordError("the path of the opening does not fit its position")
            other = bytes.fromhex(sibling)
            if first & 1 or first == last:
                node = _node(other, node)
                while first and not first & 1:
                    first, last = first >> 1, last >> 1
            else:
                node = _node(node, other)
            first, last = first >> 1, last >> 1
        if last != 0 or not 0 <= self.index < self.size:
            raise RecordError("the path of the opening does not fit its position")
        return node.hex()


@dataclass(frozen=True)
class Commitments:
    """The content of COMMITMENTS.json: the committed sets of a party, by name. Format 1."""

    sets: dict[str, list[Leaf]] = field(default_factory=dict)
    format: int = 1

    def __post_init__(self) -> None:
        if not all(self.sets.values()):
            raise SchemaError("Commitments: a set has no texts")

    @classmethod
    def read(cls, path: Path) -> "Commitments":
        """Reads the file.

        Raises:
            FileError: it cannot be read.
            SchemaError: it has other content.
        """
        return schema.read(cls, path)

    @classmethod
    def pinned(cls, path: Path, sets: Mapping[str, Sequence[str]]) -> "Commitments":
        """The commitments in a file, which is created with new salts if it does not exist.

        Args:
            path: the file; its mode is 0600.
            sets: SHA-256 (hex) of the texts of each set. Empty sets are left out.

        Raises:
            StateError: the file commits to other texts.
        """
        given = {name: list(digests) for name, digests in sets.items() if digests}
        if not path.exists():
            new = cls({name: [Leaf.of(sha256) for sha256 in digests] for name, digests in given.items()})
            write_bytes(path, new.to_bytes(), 0o600)
            return new
        kept = cls.read(path)
        found = {name: [leaf.sha256 for leaf in leaves] for name, leaves in kept.sets.items()}
        if changed := sorted(name for name in given.keys() | found.keys() if given.get(name) != found.get(name)):
            raise StateError(
                f"{path}: the party has committed to another {changed[0]} when this run began; give the same again, or "
                "start a new run in another directory"
            )
        return kept

    def to_bytes(self) -> bytes:
        """The content of the file."""
        sets = {name: [vars(leaf) for leaf in leaves] for name, leaves in self.sets.items()}
        return file_bytes({"format": self.format, "sets": sets})

    def roots(self) -> dict[str, str]:
        """The root (hex) of each set."""
        return {name: merkle_root([leaf.hash for leaf in leaves]).hex() for name, leaves in self.sets.items()}

    def open(self, name: str, text: str) -> Opening:
        """Proves that a text is in a set.

        Raises:
            RecordError: it is not.
        """
        leaves, sha256 = self.sets.get(name, []), text_digest(text)
        index = next((number for number, leaf in enumerate(leaves) if leaf.sha256 == sha256), None)
        if index is None:
            raise RecordError(f"not in the committed {name} set: {text!r:.80}; check the exact wording")
        hashes = [leaf.hash for leaf in leaves]
        path = [sibling.hex() for sibling in _path(hashes, index)]
        return Opening(text, leaves[index].salt, index, len(leaves), path)


def text_digest(text: str) -> str:
    """SHA-256 (hex) of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def plan_set(path: Path) -> list[str]:
    """The set that commits to a plan file."""
    return [file_digest(path)]


def merkle_root(hashes: Sequence[bytes]) -> bytes:
    """The root of a tree over leaf hashes (RFC 9162, section 2.1.1).

    Raises:
        ValueError: there are none.
    """
    if not hashes:
        raise ValueError("a tree needs at least one leaf")
    if len(hashes) == 1:
        return hashes[0]
    split = _split(len(hashes))
    return _node(merkle_root(hashes[:split]), merkle_root(hashes[split:]))


def _path(hashes: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes beside the path from a leaf to the root (RFC 9162, section 2.1.3.1)."""
    if len(hashes) == 1:
        return []
    split = _split(len(hashes))
    if index < split:
        return [*_path(hashes[:split], index), merkle_root(hashes[split:])]
    return [*_path(hashes[split:], index - split), merkle_root(hashes[:split])]


def _split(count: int) -> int:
    """The largest power of two below a count."""
    return int(1 << (count - 1).bit_length() - 1)


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()
