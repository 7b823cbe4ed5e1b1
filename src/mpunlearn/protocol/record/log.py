"""A party's own log: appends signed events to the record's file, one after the other.

Each append replaces the file atomically. An event that says the same as one that is there already is not added again, so a
step that is repeated after an interruption neither loses nor doubles its event.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpunlearn.errors import FileError, RecordError
from mpunlearn.files import exclusive, write_bytes
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.record.artifacts import EVENT_FILE, FileDigest, artifact_files, file_digests
from mpunlearn.protocol.record.bundle import Bundle
from mpunlearn.protocol.record.canonical import file_bytes
from mpunlearn.protocol.record.events import MAX_BYTES, Event, Kind, SignedEvent, now
from mpunlearn.storage import Place, read_json, size_of
from mpunlearn.storage import write_bytes as write_file

FILE = "record.json"
IDENTITY = "identity.key"
_PLACES = (".", "state", "server/state")
"""Where a run's record is, relative to the directory that contains the run's result."""


class Log:
    """The record of one run, as one party keeps it.

    Args:
        path: the file; it need not exist.
        identity: the key pair of the party.
        run: the run's identifier.
        server: public key (hex) of the run's server.
    """

    def __init__(self, path: Path, identity: Identity, run: str, server: str) -> None:
        self.path, self.run, self._identity, self._server = path, run, identity, server

    @classmethod
    def existing(cls, path: Path, key: Path | None = None) -> "Log":
        """The log in a file that has events.

        Args:
            path: the file.
            key: file of the key to sign with, which is created if it does not exist (default: identity.key beside the
                record or in the directory above).

        Raises:
            RecordError: the file is not a record or has no events, or there is no key.
        """
        bundle = Bundle.read(path)
        if not bundle.events:
            raise RecordError(f"{path}: has no valid events")
        if key is None:
            places = [folder / IDENTITY for folder in (path.parent, path.parent.parent)]
            key = next((place for place in places if place.is_file()), None)
        if key is None:
            raise RecordError(f"{path}: no {IDENTITY} beside it; name the key to sign with (--key)")
        first = bundle.events[0].event
        return cls(path, Identity.at(key), first.run, first.server)

    @property
    def bundle(self) -> Bundle:
        """The events so far."""
        return Bundle.read(self.path) if self.path.exists() else Bundle([], [])

    def append(
        self, kind: Kind, files: Sequence[FileDigest], content: Mapping[str, Any], after: Iterable[SignedEvent] = ()
    ) -> SignedEvent:
        """Signs an event and appends it, unless the same event is there already.

        Args:
            kind: what happened.
            files: the files that it produced, or is about.
            content: what else there is to say.
            after: events of other parties that it builds on. They are added to the record.
        """
        with exclusive(self.path.with_name(f".{self.path.name}.lock")):
            others = list(after)
            bundle = self.bundle.merged(Bundle(others, []))
            own = [event for event in bundle.events if event.event.signer == self._identity.public]
            said = (kind, list(files), dict(content), [event.id for event in others])
            for event in own:
                if (event.event.kind, event.event.files, event.event.content, event.event.after) == said:
                    return event
            previous = own[-1].id if own else ""  # of a log without equivocations, the last one
            event = Event(
                kind=kind,
                run=self.run,
                server=self._server,
                signer=self._identity.public,
                created_at=now(),
                previous=previous,
                after=[other.id for other in others],
                content=dict(content),
                files=list(files),
            ).sign(self._identity)
            write_bytes(self.path, bundle.merged(Bundle([event], [])).to_bytes(), 0o644)
            return event

    def attest(
        self,
        kind: Kind,
        folder: Place,
        content: dict[str, Any],
        after: Iterable[SignedEvent] = (),
        known: Mapping[str, str] | None = None,
    ) -> SignedEvent:
        """Appends an event about the artifact in a folder, and puts the event there as well.

        Args:
            kind: what happened.
            folder: the folder.
            content: what else there is to say.
            after: events of other parties that it builds on.
            known: SHA-256 of files that was computed when they were written, by name; the others are read.
        """
        event = self.append(kind, file_digests(artifact_files(folder), known), content, after)
        write_file(folder / EVENT_FILE, file_bytes(event.envelope), 0o644)
        return event


def append_result(kind: Kind, model: Path, result: Path) -> None:
    """Signs that a model was evaluated or audited, if it is the result of a run whose record is on this machine.

    Args:
        kind: evaluated or audited.
        model: directory of the model.
        result: the file with the result; its digest goes into the record.
    """
    records = [path for place in _PLACES if (path := model.parent / place / FILE).is_file()]
    if not (model / EVENT_FILE).is_file() or not records:
        return
    log = Log.existing(records[0])
    bundle = log.bundle
    if read_event(model / EVENT_FILE).id in bundle.by_id:
        log.append(kind, file_digests([result]), bundle.reference)


def event_of(folder: Place, known: Iterable[tuple[str, str]] | None = None) -> SignedEvent | None:
    """The event in an artifact's folder, if there is one.

    Args:
        folder: the folder.
        known: names and SHA-256 of its files, where they have just been checked (default: the files are read).

    Raises:
        RecordError: it does not verify, or the files are not those that it lists.
    """
    path = folder / EVENT_FILE
    if not path.is_file():
        return None
    event = read_event(path)
    if known is None:
        files = file_digests(artifact_files(folder))
    else:
        files = sorted((FileDigest(*pair) for pair in known if pair[0] != EVENT_FILE), key=lambda file: file.name)
    if files != event.event.files:
        raise RecordError(f"{folder}: its files are not those that {EVENT_FILE} lists; something changed them since")
    return event


def copied_event(folder: Path) -> SignedEvent | None:
    """The event in the folder of an artifact that this process has just written, if there is one; files are not read."""
    return read_event(folder / EVENT_FILE) if (folder / EVENT_FILE).is_file() else None


def read_event(path: Place) -> SignedEvent:
    """The event in a file.

    Raises:
        RecordError: it does not verify.
    """
    try:
        if size_of(path) > MAX_BYTES:
            raise RecordError(f"has more than {MAX_BYTES} bytes")
        return SignedEvent.open(read_json(path))
    except (FileError, RecordError) as error:
        raise RecordError(f"{path}: {error}") from error
