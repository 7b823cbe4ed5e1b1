"""Signed messages between the parties, and their validation.

The idea: the transport is not trusted. Every message is signed with the Ed25519 key of its sender and names the run
and, where it matters, the receiver, so it is valid nowhere else. A result names the job that it answers by digest, so
it cannot be replayed against another job. Files are sent by reference: the signed body contains their names, sizes and
SHA-256 digests, and the contents are behind a URL or, without a store, follow the body.

A *sealed* message is a signed message as bytes: `MPU1`, the length of the header (4 bytes, little-endian), the header
as JSON (body as text, key, signature), and the contents of the files that have no URL, in order. Received data is
untrusted: a message is parsed only after its signature has been verified, every field is checked for type and range,
and no field is used as a path. Not covered: encryption, which is left to TLS.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mpunlearn.checkpoint import COMPANIONS
from mpunlearn.errors import MessageError, SchemaError
from mpunlearn.protocol.identity import HEX, Identity, verify
from mpunlearn.schema import parse

MAGIC = b"MPU1"
MAX_HEADER_BYTES = 4_000_000
MAX_INLINE_BYTES = 64_000_000
"""Maximum total size of the files inside a message; larger files need a store."""
RUN = re.compile(r"[0-9a-f]{32}")
COPY_FILE = re.compile(r"config\.json|event\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
UPDATE_FILE = re.compile(
    r"update\.json|event\.json|update(-\d{5}-of-\d{5})?\.safetensors|update\.safetensors\.index\.json"
)


@dataclass(frozen=True)
class File:
    """One file of a copy or of an update."""

    name: str
    size: int
    """Size in bytes."""
    sha256: str
    url: str | None = None
    """Where to download the file; None if it is inside the message."""
    slot: int | None = None
    """In a result: number of the job's upload slot that holds the file; None if it is inside the message."""

    def check(self, allowed: re.Pattern[str], extra: Iterable[str] = ()) -> None:
        """Checks the name, the size and the format of the digest.

        Args:
            allowed: pattern of allowed names.
            extra: further allowed names.

        Raises:
            SchemaError: the name is not allowed, or the size or the digest is invalid.
        """
        if not (allowed.fullmatch(self.name) or self.name in extra):
            raise SchemaError(f"unexpected file name {self.name!r:.80}; expected a file of a copy or an update")
        if self.size < 0 or not HEX.fullmatch(self.sha256):
            raise SchemaError(f"{self.name}: invalid size or SHA-256")


@dataclass(frozen=True)
class Challenge:
    """The server asks a node which client it relays messages for."""

    run: str
    nonce: str
    node: str
    kind: str = "challenge"


@dataclass(frozen=True)
class Hello:
    """The client's answer to a challenge."""

    run: str
    nonce: str
    node: str
    kind: str = "hello"


@dataclass(frozen=True)
class Job:
    """One published copy to unlearn on."""

    run: str
    client: str
    """Public key of the client that the job is for."""
    round: int
    """Starts at 1."""
    rounds: int
    copy: int
    """Starts at 1."""
    copies: int
    training: dict[str, Any]
    """The training plan: the fields of `Training`."""
    files: list[File]
    slots: list[str] = field(default_factory=list)
    """Upload slots: URLs to which the update's files may be uploaded. Empty: the files are sent inside the result."""
    attempt: int = 1
    """How often the server has requested this update, starting at 1."""
    nonce: str = ""
    """Random value that makes each job a different message."""
    kind: str = "job"

    def __post_init__(self) -> None:
        if not (0 < self.round <= self.rounds and 0 < self.copy <= self.copies and self.attempt > 0):
            raise SchemaError(
                f"invalid numbers: copy {self.copy} of {self.copies}, round {self.round} of {self.rounds}, attempt "
                f"{self.attempt}"
            )
        _check_files(self.files, COPY_FILE, COMPANIONS)


@dataclass(frozen=True)
class Result:
    """A client's answer to a job: an update, or the reason for declining the job."""

    run: str
    job: str
    """SHA-256 of the sealed job."""
    files: list[File] = field(default_factory=list)
    refusal: str | None = None
    kind: str = "result"

    def __post_init__(self) -> None:
        _check_files(self.files, UPDATE_FILE)
        if bool(self.files) == (self.refusal is not None):
            raise SchemaError("a result must have either files or a refusal")


@dataclass(frozen=True)
class Finished:
    """The run is over, successfully or not."""

    run: str
    outcome: str
    kind: str = "finished"


KINDS: dict[str, type[Any]] = {
    "challenge": Challenge,
    "hello": Hello,
    "job": Job,
    "result": Result,
    "finished": Finished,
}


def _check_files(files: list[File], allowed: re.Pattern[str], extra: Iterable[str] = ()) -> None:
    for file in files:
        file.check(allowed, extra)
    if len({file.name for file in files}) != len(files):
        raise SchemaError("two files have the same name")


def seal(message: Any, identity: Identity, payloads: Iterable[Path] = ()) -> bytes:
    """Signs a message and serializes it.

    Args:
        message: an instance of one of `KINDS`.
        identity: the key pair of the sender.
        payloads: paths of the files that have neither a URL nor a slot, in the order in which the message lists them.
    """
    body = json.dumps(dataclasses.asdict(message), ensure_ascii=False)
    header = {"body": body, "key": identity.public, "signature": identity.sign(body)}
    text = json.dumps(header).encode()
    return b"".join([MAGIC, len(text).to_bytes(4, "little"), text, *(path.read_bytes() for path in payloads)])


@dataclass(frozen=True)
class Sealed:
    """A message whose signature has been verified."""

    name: str
    """SHA-256 of the sealed message."""
    sender: str
    """The public key that signed the message."""
    message: Any
    payload: memoryview

    @classmethod
    def open(cls, data: bytes, sender: str | None = None) -> Self:
        """Verifies and parses a message.

        Args:
            data: the received bytes.
            sender: the public key that must have signed the message (default: any).

        Raises:
            MessageError: the message is damaged, not signed by that key, or not one of `KINDS`.
        """
        if data[:4] != MAGIC:
            raise MessageError(f"not a sealed message: expected it to start with {MAGIC!r}, found {data[:4]!r}")
        length = int.from_bytes(data[4:8], "little")
        if length > MAX_HEADER_BYTES or len(data) < 8 + length:
            raise MessageError(f"damaged: has a header of {length} bytes, but {len(data)} bytes in total")
        header = _json(data[8 : 8 + length])
        if set(header) != {"body", "key", "signature"} or not all(isinstance(value, str) for value in header.values()):
            raise MessageError("invalid header: expected body, key and signature")
        if not HEX.fullmatch(header["key"]):
            raise MessageError("invalid public key")
        if sender is not None and header["key"] != sender:
            raise MessageError(f"signed by {header['key']:.16}, expected {sender[:16]}")
        verify(header["body"], header["key"], header["signature"])
        body = _json(header["body"].encode())
        kind = KINDS.get(str(body.get("kind")))
        if kind is None:
            raise MessageError(f"unknown kind of message {body.get('kind')!r:.40}; expected one of {', '.join(KINDS)}")
        try:
            message = parse(kind, body)
        except SchemaError as error:
            raise MessageError(str(error)) from None
        if not RUN.fullmatch(message.run):
            raise MessageError("invalid run identifier")
        payload = memoryview(data)[8 + length :]
        files: list[File] = getattr(message, "files", [])
        inline = sum(file.size for file in files if file.url is None and file.slot is None)
        if inline != len(payload) or inline > MAX_INLINE_BYTES:
            raise MessageError(f"contains files of {len(payload)} bytes, expected {inline}, at most {MAX_INLINE_BYTES}")
        return cls(hashlib.sha256(data).hexdigest(), header["key"], message, payload)

    def payloads(self) -> dict[str, memoryview]:
        """The contents of the files inside the message, by name. Their digests have not been checked yet."""
        files, start = {}, 0
        for file in self.message.files:
            if file.url is None and file.slot is None:
                files[file.name] = self.payload[start : start + file.size]
                start += file.size
        return files


def _json(data: bytes | memoryview) -> dict[str, Any]:
    def number(text: str) -> float:
        raise ValueError(f"{text} is not a number")

    try:
        value = json.loads(bytes(data), parse_constant=number)
        json.dumps(value, ensure_ascii=False).encode()  # fails on a lone surrogate, which could not be written later
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MessageError(f"expected a JSON object, found {type(value).__name__}")
    return value
