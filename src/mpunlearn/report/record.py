"""The record of a run for its report: what happened, in sentences, and whether it verifies.

Notes in events are left out, since anyone may have written anything into them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mpunlearn.report import words
from mpunlearn.report.data import RecordSummary

if TYPE_CHECKING:
    from mpunlearn.protocol.record.events import Event

_ROUNDS = ("published", "updated", "aggregated")
_SENTENCES = {
    "evaluated": "The result was evaluated.",
    "audited": "The run was audited.",
    "replicated": "The run was replicated.",
    "withdrawn": "An event was withdrawn.",
}


def record_summary(folder: Path) -> RecordSummary | None:
    """Verifies the record in a directory with all files there; None if there is no record."""
    from mpunlearn.protocol.record.log import FILE
    from mpunlearn.protocol.record.verification import verify

    if not any(folder.rglob(FILE)):
        return None
    found = verify([folder])
    events, missing = [event.event for event in found.bundle.events], len(found.bundle.absent)
    absent = [f"Missing here: {words.count(missing, 'event')} that others name."] if missing else []
    problems = (*(problem[0].upper() + problem[1:] + "." for problem in found.problems), *absent)
    happened = (
        *_rounds(events),
        *((_time(event), _SENTENCES[event.kind]) for event in events if event.kind in _SENTENCES),
    )
    return RecordSummary(f"mpu:{found.bundle.number}", happened, found.valid, problems)


def _rounds(events: "list[Event]") -> list[tuple[str, str]]:
    """What happened in each round: the time of its last event, and a sentence."""
    happened = []
    rounds = sorted({event.content["round"] for event in events if event.kind in _ROUNDS and "round" in event.content})
    for number in rounds:
        own = [event for event in events if event.kind in _ROUNDS and event.content.get("round") == number]
        copies, updates = (sum(event.kind == kind for event in own) for kind in _ROUNDS[:2])
        done = any(event.kind == "aggregated" for event in own)
        parts = [words.count(copies, "copy was published", "copies were published")] if copies else []
        parts += (
            [words.count(updates, "update was signed by a client", "updates were signed by clients")] if updates else []
        )
        parts += ["the updates were aggregated"] if done else []
        happened.append((_time(own[-1]), f"Round {number}: {', '.join(parts)}."))
    return happened


def _time(event: "Event") -> str:
    return event.created_at.replace("T", " ").replace("Z", " UTC")
