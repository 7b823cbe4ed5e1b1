"""One event of a record: a DSSE envelope around an in-toto statement.

    envelope    DSSE 1.0, payload type application/vnd.in-toto+json, one Ed25519 signature
    statement   in-toto Statement v1: the files that the event produced as subjects, and the event as the predicate
    id          sha256: and the SHA-256 (hex) of the statement, which is canonical JSON (RFC 8785)

Tools for software supply chains read both formats. `securesystemslib` signs and verifies. The id of the signing key is its
fingerprint as in the Pith open graph: the first 16 bytes of the SHA-256 of the raw public key.
"""

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from mpunlearn.errors import RecordError, SchemaError
from mpunlearn.protocol.identity import HEX, Identity
from mpunlearn.protocol.record.artifacts import FileDigest, artifact_digest
from mpunlearn.protocol.record.canonical import canonical
from mpunlearn.schema import parse, typed

if TYPE_CHECKING:
    from securesystemslib.signer._key import SSlibKey

Kind = Literal["published", "updated", "aggregated", "evaluated", "audited", "replicated", "withdrawn"]
SERVER_KINDS = ("published", "aggregated")
"""Kinds of events that only the server of a run can sign."""
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://github.com/mpunlearn/mpunlearn/blob/main/docs/record.md#event-v1"
CONTENT: dict[str, Any] = {
    "round": int,
    "copy": int,
    "copies": int,
    "commitments": dict[str, str],
    "software": dict[str, str],
    "plan": dict[str, Any],
    "model": str,
    "base": str,
    "stand_in": str,
    "materials": dict[str, list[FileDigest]],
    "updates": list[dict[str, str | int]],
    "record": str,
    "result": str,
    "target": str,
    "note": str,
}
"""What the content of an event can have, and of which type."""
_ID = re.compile(r"sha256:[0-9a-f]{64}")
_RUN = re.compile(r"[0-9a-f]{32}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
MAX_BYTES = 2_000_000
"""Maximum size of an event's file: the names and digests of more than ten thousand files."""


@dataclass(frozen=True)
class Event:
    """The content of an event.

    Raises:
        SchemaError: a value has the wrong form, or the signer cannot do this.
    """

    kind: Kind
    run: str
    """The run's identifier, 32 hexadecimal digits."""
    server: str
    """Public key (hex) of the server of the run."""
    signer: str
    """Public key (hex) of the party that did this."""
    created_at: str
    """By the signer's clock, in UTC: 2026-11-25T12:00:00Z."""
    previous: str = ""
    """Id of the signer's previous event in this run; empty in its first."""
    after: list[str] = field(default_factory=list)
    """Ids of the events of other parties that this one builds on."""
    content: dict[str, Any] = field(default_factory=dict)
    """What else there is to say, depending on the kind; see `CONTENT`. Strings and integers only."""
    files: list[FileDigest] = field(default_factory=list)
    """The files that the event produced or speaks of."""

    def __post_init__(self) -> None:
        ids = [*self.after, *([self.previous] if self.previous else [])]
        valid = [
            _RUN.fullmatch(self.run),
            HEX.fullmatch(self.server),
            HEX.fullmatch(self.signer),
            _TIME.fullmatch(self.created_at),
            all(_ID.fullmatch(one) for one in ids) and len(set(ids)) == len(ids),
            len({file.name for file in self.files}) == len(self.files),
            self.files or self.kind in ("replicated", "withdrawn"),
        ]
        if not all(valid):
            raise SchemaError(f"Event: not a valid event of kind {self.kind}")
        for name, value in self.content.items():
            if name not in CONTENT:
                raise SchemaError(f"Event: unknown content {name!r:.40}")
            typed(CONTENT[name], value, f"Event.content.{name}")
        if self.kind in SERVER_KINDS and self.signer != self.server:
            raise SchemaError(f"Event: {self.kind} must be signed by the server of the run")

    @property
    def digest(self) -> str:
        """The digest of the artifact that the files form."""
        return artifact_digest(self.files)

    def statement(self) -> bytes:
        """The in-toto statement, as canonical JSON."""
        predicate = asdict(self)
        files = predicate.pop("files")
        subject = [{"name": file["name"], "digest": {"sha256": file["sha256"]}} for file in files]
        return canonical(
            {
                "_type": STATEMENT_TYPE,
                "subject": subject,
                "predicateType": PREDICATE_TYPE,
                "predicate": {**predicate, "version": 1},
            }
        )

    def sign(self, identity: Identity) -> "SignedEvent":
        """Signs the event.

        Raises:
            ValueError: the identity is not that of the signer.
        """
        from securesystemslib.dsse import Envelope
        from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

        if identity.public != self.signer:
            raise ValueError("an event is signed by its own signer")
        envelope = Envelope(self.statement(), PAYLOAD_TYPE, {})
        envelope.sign(CryptoSigner(identity.key, _key(identity.public)))
        return SignedEvent(self, envelope.to_dict())


@dataclass(frozen=True)
class SignedEvent:
    """An event whose signature has been verified."""

    event: Event
    envelope: dict[str, Any]
    """The DSSE envelope, as JSON."""

    @cached_property
    def id(self) -> str:
        """The id of the event."""
        return f"sha256:{hashlib.sha256(self.event.statement()).hexdigest()}"

    @classmethod
    def open(cls, envelope: Any) -> "SignedEvent":
        """Verifies an envelope.

        Raises:
            RecordError: it is damaged, not an event of this kind of record, or its signature is not valid.
        """
        from securesystemslib.dsse import Envelope
        from securesystemslib.exceptions import VerificationError

        try:
            opened = Envelope.from_dict(copy.deepcopy(envelope))
            if opened.payload_type != PAYLOAD_TYPE or opened.to_dict() != envelope:
                raise RecordError("not a DSSE envelope around an in-toto statement, or not in canonical form")
            event = parse_statement(opened.payload)
            if event.statement() != opened.payload or len(opened.signatures) != 1:
                raise RecordError("the statement is not in canonical form, or has not exactly one signature")
            opened.verify([_key(event.signer)], 1)
        except VerificationError as error:
            raise RecordError("the signature of the event is not valid: it was changed, or forged") from error
        except SchemaError as error:
            raise RecordError(f"not an event: {error}") from error
        except RecordError:
            raise
        except Exception as error:  # whatever the library raises on damaged input
            raise RecordError(f"not a DSSE envelope: {type(error).__name__}") from error
        return cls(event, dict(envelope))


def fingerprint(public: str) -> str:
    """The fingerprint (hex) of a public key (hex): the first 16 bytes of its SHA-256."""
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()[:32]


def now() -> str:
    """The time of an event that happens now."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _key(public: str) -> "SSlibKey":
    from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

    return SSlibKey(fingerprint(public), "ed25519", "ed25519", {"public": public})


def parse_statement(payload: bytes) -> Event:
    """Parses a statement.

    Raises:
        RecordError: it is not JSON, or not a statement of ours.
        SchemaError: a field is missing or invalid.
    """
    try:
        statement = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"the statement is not JSON: {error}") from error
    if not isinstance(statement, dict) or set(statement) != {"_type", "subject", "predicateType", "predicate"}:
        raise RecordError("not an in-toto statement")
    if statement["_type"] != STATEMENT_TYPE or statement["predicateType"] != PREDICATE_TYPE:
        raise RecordError("not a statement about a run of mpunlearn, or one of a newer version")
    predicate = typed(dict[str, Any], statement["predicate"], "predicate")
    if predicate.pop("version", None) != 1:
        raise RecordError("an event of a newer version; upgrade mpunlearn")
    files = [_file(subject) for subject in typed(list[dict[str, Any]], statement["subject"], "subject")]
    return parse(Event, {**predicate, "files": files})


def _file(subject: Mapping[str, Any]) -> dict[str, Any]:
    if set(subject) != {"name", "digest"} or not isinstance(subject["digest"], dict):
        raise RecordError("a subject has a name and a SHA-256")
    return {"name": subject["name"], **subject["digest"]}
