"""Compares a record with itself and with the files that are at hand.

Needs no secret and no network. Every file that takes part in the record is found by its name, wherever it lies below the
given folder: records (`record.json`), artifacts (directories with an `event.json`), commitments with the plan beside them,
and keys. Whatever differs is a problem, and its file is named. Files that are not there are no problem: what is listed
says how many were checked.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpunlearn.errors import MPUError, RecordError
from mpunlearn.files import file_digest, read_json
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.record import commitments, log
from mpunlearn.protocol.record.artifacts import EVENT_FILE, FileDigest, artifact_files, file_digests
from mpunlearn.protocol.record.bundle import Bundle
from mpunlearn.protocol.record.canonical import file_bytes
from mpunlearn.protocol.record.commitments import Commitments, Opening
from mpunlearn.protocol.record.events import SignedEvent
from mpunlearn.schema import parse

PLANS = ("plan.json", "run.json")
"""Names of a party's plan file, in the directory of its commitments or the one above."""


@dataclass
class Verification:
    """What was checked, and what is wrong."""

    bundle: Bundle
    """The merged events of all records."""
    files: int = 0
    """How many files were compared with the record."""
    problems: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, *problems: str) -> None:
        """Notes problems."""
        self.problems += problems


def verify(paths: Sequence[Path], model: Path | None = None, openings: Iterable[Path] = ()) -> Verification:
    """Verifies records and all files that belong to them.

    Args:
        paths: record files, or directories to search.
        model: directory of the server's model, to compare with the record.
        openings: files of `mpunlearn record open`.

    Raises:
        RecordError: there is no record.
    """
    found = list(_files(paths))
    records = [path for path in found if path.name not in (EVENT_FILE, commitments.FILE, log.IDENTITY)]
    if not records:
        raise RecordError(f"{', '.join(map(str, paths))}: contains no {log.FILE}")
    result = Verification(Bundle([], []))
    bundles = [bundle for path in records if (bundle := _record(path, result)) is not None]
    try:
        result.bundle = Bundle([], []).merged(*bundles)
    except RecordError as error:
        result.add(str(error))
        return result
    for event in result.bundle.equivocations:
        signer, kind = event.event.signer[:16], event.event.kind
        result.add(f"equivocation: {signer} signed two different histories, one with {kind} {event.id[:23]}")
    checks = {EVENT_FILE: _artifact, commitments.FILE: _commitments, log.IDENTITY: _identity}
    for path in found:
        if path.name in checks:
            checks[path.name](path, result)
    if model is not None:
        _model(model, result)
    for path in openings:
        _opening(path, result)
    return result


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """The given files, and those in the given directories that take part in a record."""
    for path in paths:
        if path.is_dir():
            for name in (log.FILE, EVENT_FILE, commitments.FILE, log.IDENTITY):
                yield from sorted(path.rglob(name))
        else:
            yield path


def _record(path: Path, result: Verification) -> Bundle | None:
    """Reads a record, and compares everything in it with what follows from its events."""
    try:
        bundle = Bundle.read(path)
        written = bundle.to_bytes()
    except RecordError as error:
        result.add(str(error) if str(path) in str(error) else f"{path}: {error}")
        return None
    result.files += 1
    for envelope in bundle.invalid:
        try:
            SignedEvent.open(envelope)
        except RecordError as error:
            result.add(f"{path}: an event does not verify: {error}")
    if path.read_bytes() != written:
        result.add(f"{path}: is not what follows from its events; something changed it")
    return bundle


def _artifact(path: Path, result: Verification) -> None:
    """Compares the files of an artifact with its event, and the event with the record."""
    try:
        event = log.read_event(path)
    except RecordError as error:
        result.add(str(error))
        return
    result.files += 1
    if event.id not in result.bundle.by_id:
        result.add(f"{path}: this event is not in the record")
    if path.read_bytes() != file_bytes(event.envelope):
        result.add(f"{path}: something changed its formatting")
    expected = {file.name: file.sha256 for file in event.event.files}
    actual = {file.name: file.sha256 for file in file_digests(artifact_files(path.parent))}
    _compare(path.parent, expected, actual, result)


def _compare(folder: Path, expected: dict[str, str], actual: dict[str, str], result: Verification) -> None:
    result.files += len(expected.keys() & actual.keys())
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            result.add(f"{folder / name}: missing; the record lists it")
        elif name not in expected:
            result.add(f"{folder / name}: not in the record")
        elif actual[name] != expected[name]:
            result.add(f"{folder / name}: changed; its SHA-256 is not the recorded one")


def _commitments(path: Path, result: Verification) -> None:
    """Compares the salts of a party with the roots in the record, and its plan with its commitment."""
    try:
        kept = Commitments.read(path)
    except MPUError as error:
        result.add(str(error) if str(path) in str(error) else f"{path}: {error}")
        return
    result.files += 1
    published = [event.event.content.get("commitments") for event in result.bundle.events]
    if kept.roots() not in published or path.read_bytes() != kept.to_bytes():
        result.add(f"{path}: does not lead to the commitments in the record; something changed it")
    places = [folder / name for folder in (path.parent, path.parent.parent) for name in PLANS]
    plan = next((place for place in places if place.is_file()), None)
    if plan is not None and (leaves := kept.sets.get(commitments.PLAN)):
        result.files += 1
        if leaves[0].sha256 != file_digest(plan):
            result.add(f"{plan}: changed; not the plan that the party has committed to")


def _identity(path: Path, result: Verification) -> None:
    """Checks that the key of a party is one that has signed."""
    result.files += 1
    try:
        if Identity.at(path).public not in {event.event.signer for event in result.bundle.events}:
            result.add(f"{path}: no event was signed with this key; something changed it")
    except MPUError as error:
        result.add(str(error))


def _model(folder: Path, result: Verification) -> None:
    """Compares the server's model with the files that the first copy was made of."""
    for event in result.bundle.of_kind("published"):
        materials: Any = event.event.content.get("materials", {}).get("model")
        if materials:
            listed = [parse(FileDigest, entry) for entry in materials]
            present = [folder / file.name for file in listed if (folder / file.name).is_file()]
            actual = {file.name: file.sha256 for file in file_digests(present)}
            _compare(folder, {file.name: file.sha256 for file in listed}, actual, result)
            return
    result.add(f"{folder}: the record does not list the files of the model; it begins after round 1")


def _opening(path: Path, result: Verification) -> None:
    """Checks that the texts of an opening are in a set that a client has committed to."""
    try:
        value = read_json(path)
        name, client, entries = str(value["set"]), value["client"], value["openings"]
        roots = {parse(Opening, entry).root() for entry in entries}
    except (MPUError, KeyError, TypeError) as error:
        result.add(f"{path}: not an opening: {error}")
        return
    result.files += 1
    committed = {
        event.event.content.get("commitments", {}).get(name)
        for event in result.bundle.of_kind("updated")
        if event.event.signer == client
    }
    if not roots or not roots <= committed:
        result.add(f"{path}: these texts are not in the {name} set that the client {str(client)[:16]} has committed to")
