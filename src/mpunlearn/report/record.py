"""The record of a run for its report: what happened, in sentences, and whether it verifies.

Notes in events are left out, since anyone may have written anything into them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mpunlearn.report.data import RecordSummary

if TYPE_CHECKING:
    from mpunlearn.protocol.record.events import Event

_SENTENCES = {
    "published": "The server published copy {copy} of round {round}.",
    "updated": "The client signed its update of copy {copy} of round {round}.",
    "aggregated": "The server aggregated the updates of round {round}.",
    "evaluated": "The result was evaluated.",
    "audited": "The run was audited.",
    "replicated": "The run was replicated.",
    "withdrawn": "An event was withdrawn.",
}


def record_summary(folder: Path) -> RecordSummary | None:
    """Verifies the record in a directory with all files there; None if there is no record."""
    from mpunlearn.errors import RecordError
    from mpunlearn.protocol.record.verification import verify

    try:
        found = verify([folder])
    except RecordError:
        return None
    events = tuple((_time(event.event), _sentence(event.event)) for event in found.bundle.events)
    absent = [f"{len(found.bundle.absent)} events that others name are not here."] if found.bundle.absent else []
    problems = (*(problem[0].upper() + problem[1:] + "." for problem in found.problems), *absent)
    return RecordSummary(f"mpu:{found.bundle.number}", events, found.valid, problems)


def _sentence(event: "Event") -> str:
    places = {name: event.content.get(name, "?") for name in ("round", "copy")}
    return _SENTENCES[event.kind].format(**places)


def _time(event: "Event") -> str:
    return event.created_at.replace("T", " ").replace("Z", " UTC")
