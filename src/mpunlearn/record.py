"""The commands of a run's record: show it, verify it, merge it, open a commitment, and add to it.

    mpunlearn record show RUN                             what happened, in order, and the number of the record
    mpunlearn record verify RUN                           compare it with all files at hand
    mpunlearn record merge A B --out record.json          one record of what both parties have
    mpunlearn record open CLIENT --forget F --out O       prove that texts were in the committed forget set
    mpunlearn record add RUN replicated --file F          sign another event

RUN is a directory, which is searched, or a record's file. docs/record.md says what a record proves, and what it does not.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpunlearn.errors import FileError, PlanError, RecordError
from mpunlearn.files import as_path, read_json, write_bytes
from mpunlearn.lm.sources import Data

if TYPE_CHECKING:
    from mpunlearn.protocol.record.bundle import Bundle
    from mpunlearn.protocol.record.events import SignedEvent
    from mpunlearn.protocol.record.verification import Verification


@dataclass(frozen=True)
class Story:
    """A record for people to read."""

    bundle: "Bundle"

    def text(self) -> str:
        """The events, one per line, and the number."""
        lines = [_line(event) for event in self.bundle.events]
        invalid = len(self.bundle.invalid)
        return "\n".join(
            [*lines, *([f"{invalid} events do not verify"] if invalid else []), f"record {_name(self.bundle)}"]
        )

    def to_json(self) -> dict[str, Any]:
        """The current state."""
        return self.bundle.state()


@dataclass(frozen=True)
class Verified:
    """The outcome of a verification."""

    verification: "Verification"

    def text(self) -> str:
        """What was checked, and every problem."""
        found = self.verification
        bundle, problems = found.bundle, [f"problem: {problem}" for problem in found.problems]
        absent = len(bundle.absent)
        lines = [
            f"record {_name(bundle)}",
            f"{len(bundle.events)} events with valid signatures, {len(bundle.invalid)} without, "
            f"{len(bundle.equivocations)} equivocations",
            *([f"incomplete: {absent} events that others name are not here"] if absent else []),
            f"{found.files} files compared",
            *problems,
            "verified" if found.valid else f"does not verify: {len(problems)} problems",
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The state of the record, and what was checked."""
        found = self.verification
        return {
            "valid": found.valid,
            "files": found.files,
            "problems": found.problems,
            "absent": found.bundle.absent,
            **found.bundle.state(),
        }


@dataclass(frozen=True)
class PithVerified:
    """The outcome for a bundle of the Pith open graph, which has no problems."""

    number: str
    receipt: bool
    """Whether the bundle has a receipt, which was verified, too."""
    events: int
    """How many events it has; they are not looked at."""

    def text(self) -> str:
        """One line."""
        checked = "number, aliases and receipt" if self.receipt else "number and aliases"
        return f"pith:{self.number}: record, {checked} verified; {self.events} events not looked at"

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)


def show(record: str | Path) -> Story:
    """Shows what happened in a run, in order, and the number of its record.

    Args:
        record: A record's file, or a directory to search for records.

    Returns:
        The events and the current state.

    Raises:
        RecordError: There is no record, or it cannot be read.
    """
    return Story(_bundle(as_path(record, "record")))


def verify(
    record: Sequence[str | Path],
    *,
    model: str | Path | None = None,
    opening: str | Path | None = None,
    public_key: str | None = None,
) -> Verified | PithVerified:
    """Verifies a record: signatures, order, and the digests of all files at hand. Needs no secret and no network.

    Args:
        record: Records' files, directories to search for records, copies, updates and models, or the bundle.json of a
            Pith record.
        model: Directory of the server's original model, to compare with the record.
        opening: A file of `mpunlearn record open`.
        public_key: Ed25519 public key (base64) for the receipt of a Pith record.

    Returns:
        What was checked.

    Raises:
        RecordError: Something does not verify. The error has the result.
    """
    from mpunlearn.protocol.record import pith, verification

    paths = [as_path(path, "record") for path in record]
    if len(paths) == 1 and paths[0].is_file():
        content = _json(paths[0])
        if content.get("bundle_type") == pith.BUNDLE_TYPE:
            if problems := pith.problems_of(content, public_key):
                raise RecordError(f"{paths[0]}: {'; '.join(problems)}")
            events = content.get("events") or []
            return PithVerified(str(content["pith_number"]), isinstance(content.get("receipt"), dict), len(events))
    for path in paths:
        if not path.exists():
            raise RecordError(f"{path}: no such file or directory")
    openings = [as_path(opening, "--opening")] if opening is not None else []
    found = verification.verify(paths, as_path(model, "--model") if model is not None else None, openings)
    result = Verified(found)
    if not found.valid:
        raise RecordError(f"does not verify: {found.problems[0]}", result)
    return result


def merge(record: Sequence[str | Path], *, out: str | Path) -> Path:
    """Merges records of one run. The same events give the same bytes, in any order and grouping.

    Args:
        record: Records' files, or directories to search.
        out: The file to write. It is replaced if it exists.

    Returns:
        `out`.

    Raises:
        RecordError: They belong to different runs, or cannot be read.
    """
    from mpunlearn.protocol.record.bundle import Bundle

    merged = Bundle([], []).merged(*(_bundle(as_path(path, "record")) for path in record))
    target = as_path(out, "--out")
    write_bytes(target, merged.to_bytes(), 0o644)
    return target


def open(
    client: str | Path,
    *,
    out: str | Path,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
    data: Data | None = None,
) -> Path:
    """Proves that texts were in the set that this client committed to, by showing them and their salts.

    Args:
        client: The client's own directory, with its commitments: WORK, or RUN/client.
        out: The file to write. Whoever gets it sees these texts, and learns nothing about others but their number.
        forget: Texts of the forget set, in any format that `unlearn` reads.
        retain: Texts of the retain set, in any format that `unlearn` reads.
        data: How to read the texts.

    Returns:
        `out`.

    Raises:
        RecordError: A text was not in the set.
        FileError: The directory has no commitments.
    """
    from mpunlearn.lm.records import read_records, record_text
    from mpunlearn.protocol.identity import Identity
    from mpunlearn.protocol.record.canonical import file_bytes
    from mpunlearn.protocol.record.commitments import FILE, Commitments
    from mpunlearn.protocol.record.log import IDENTITY

    folder, given = as_path(client, "client"), {"forget": forget, "retain": retain}
    named = [(name, path) for name, path in given.items() if path is not None]
    if len(named) != 1:
        raise PlanError("expected either --forget or --retain, the texts to show")
    if not (folder / FILE).is_file():
        raise FileError(f"{folder}: has no {FILE}; give the client's own directory, WORK or RUN/client")
    name, source = named[0]
    kept = Commitments.read(folder / FILE)
    openings = [asdict(kept.open(name, record_text(record))) for record in read_records(source, data, name)]
    public = Identity.at(folder / IDENTITY).public
    target = as_path(out, "--out")
    write_bytes(target, file_bytes({"format": 1, "client": public, "set": name, "openings": openings}), 0o600)
    return target


def add(
    record: str | Path,
    kind: Literal["evaluated", "audited", "replicated", "withdrawn"],
    *,
    file: str | Path | None = None,
    key: str | Path | None = None,
    target: str | None = None,
    note: str | None = None,
) -> str:
    """Signs an event about a run and appends it to the record.

    Args:
        record: The record's file, or a directory to search.
        kind: What happened: the result was evaluated or audited, the run was replicated, or an event is withdrawn.
        file: The result, such as the JSON of `evaluate --out`. Only its digest goes into the record.
        key: File of the Ed25519 key to sign with, which is created if it does not exist (default: the party's own, beside
            the record).
        target: For withdrawn: the id of an own event, or the run's identifier to withdraw the whole record.
        note: A sentence to include.

    Returns:
        The id of the event.

    Raises:
        RecordError: There is no record, or the event is not complete.
    """
    from mpunlearn.protocol.record.artifacts import file_digests
    from mpunlearn.protocol.record.log import Log

    if kind in ("evaluated", "audited") and file is None:
        raise RecordError(f"{kind}: give --file, the result")
    if (kind == "withdrawn") != (target is not None):
        raise RecordError("--target: the id of the event to withdraw; needed for `withdrawn` only")
    path = _records(as_path(record, "record"))[0]
    log = Log.existing(path, as_path(key, "--key") if key is not None else None)
    given = {name: value for name, value in (("target", target), ("note", note)) if value is not None}
    return log.append(
        kind, file_digests([as_path(file, "--file")] if file is not None else []), {**log.bundle.reference, **given}
    ).id


def _records(path: Path) -> list[Path]:
    """The records' files at a path; the one with the most events first.

    Raises:
        RecordError: there is none.
    """
    from mpunlearn.protocol.record.log import FILE

    found = [path] if path.is_file() else sorted(path.rglob(FILE), key=lambda file: -file.stat().st_size)
    if not found:
        raise RecordError(f"{path}: contains no {FILE}; a run writes one as it goes")
    return found


def _bundle(path: Path) -> "Bundle":
    """The events of all records at a path."""
    from mpunlearn.protocol.record.bundle import Bundle

    return Bundle([], []).merged(*(Bundle.read(file) for file in _records(path)))


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileError as error:
        raise RecordError(str(error)) from error


def _name(bundle: "Bundle") -> str:
    return f"mpu:{bundle.number} (short mpu:{bundle.number[:8]})"


def _line(event: "SignedEvent") -> str:
    """One event for people to read."""
    content, party = event.event.content, "server" if event.event.signer == event.event.server else "client"
    who = f"{party} {event.event.signer[:8]}" if event.event.kind != "replicated" else event.event.signer[:8]
    where = ", ".join(f"{name} {content[name]}" for name in ("round", "copy") if name in content)
    note = f": {json.dumps(content['note'], ensure_ascii=False)}" if "note" in content else ""
    return f"{event.event.created_at}  {who}  {event.event.kind:10s} {where}{note}  {event.id[7:19]}"
