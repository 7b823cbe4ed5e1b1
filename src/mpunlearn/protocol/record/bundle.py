"""A set of events, and what follows from it: the canonical record of the run, its number, and its current state.

The idea: a bundle is never trusted, only its events are. Everything else in its file is computed from them again when it is
read. `merge` is a union of sets followed by a fixed order, so any order, repetition or grouping of the same events gives
the same bytes. Events that do not verify are kept and counted, since they may be evidence.

Two different events of one signer with the same predecessor are an *equivocation*: the signer has told two stories. Events
whose predecessor is not in the bundle are *incomplete*, as in the log of a client that has not seen the server's. The
last events of a log can be withheld without a trace.
"""

import heapq
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mpunlearn.errors import FileError, RecordError
from mpunlearn.files import read_json
from mpunlearn.protocol.record.canonical import SHORT_CHARACTERS, digest, file_bytes, number
from mpunlearn.protocol.record.events import Event, Kind, SignedEvent

BUNDLE_TYPE, BUNDLE_VERSION = "mpunlearn_record_bundle", "1.0"
STATE_TYPE, STATE_VERSION = "mpunlearn_record_state", "1.0"
MERGE_VERSION = "mpunlearn-record-merge-v1"


@dataclass(frozen=True)
class Bundle:
    """The events of one run. Build it with `Bundle.of`."""

    events: list[SignedEvent]
    """The valid events, each after the events that it names; otherwise by time and id."""
    invalid: list[Any]
    """Envelopes that do not verify, in a fixed order."""

    @classmethod
    def of(cls, envelopes: Iterable[Any]) -> "Bundle":
        """Verifies and orders envelopes.

        Raises:
            RecordError: they belong to different runs.
        """
        valid, invalid = [], []
        for envelope in envelopes:
            try:
                valid.append(SignedEvent.open(envelope))
            except RecordError:
                invalid.append(envelope)
        return cls._of(valid, invalid)

    @classmethod
    def _of(cls, valid: Iterable[SignedEvent], invalid: Iterable[Any]) -> "Bundle":
        # A signer can sign one event in several ways; the same one is kept, whatever the order.
        events = {event.id: event for event in sorted(valid, key=lambda event: file_bytes(event.envelope))}
        others = {json.dumps(envelope, sort_keys=True): envelope for envelope in invalid}
        if len(runs := {(event.event.run, event.event.server) for event in events.values()}) > 1:
            raise RecordError(f"these are events of {len(runs)} different runs; merge the records of one run only")
        return cls(_ordered(events), [others[key] for key in sorted(others)])

    @classmethod
    def read(cls, path: Path) -> "Bundle":
        """Reads a bundle's file. What it says beside the events is not looked at; `verification` compares it.

        Raises:
            RecordError: it is not a bundle.
        """
        try:
            value = read_json(path)
        except FileError as error:
            raise RecordError(str(error)) from error
        if value.get("bundle_type") != BUNDLE_TYPE or not isinstance(value.get("events"), list):
            raise RecordError(f"{path}: expected a {BUNDLE_TYPE}, found {value.get('bundle_type')!r:.40}")
        return cls.of(value["events"])

    def merged(self, *others: "Bundle") -> "Bundle":
        """The union with other bundles of the same run; errors as for `of`."""
        bundles = (self, *others)
        valid = (event for bundle in bundles for event in bundle.events)
        return Bundle._of(valid, (envelope for bundle in bundles for envelope in bundle.invalid))

    @property
    def envelopes(self) -> list[Any]:
        """All envelopes, valid ones first."""
        return [*(event.envelope for event in self.events), *self.invalid]

    @cached_property
    def by_id(self) -> dict[str, SignedEvent]:
        """The valid events by their ids."""
        return {event.id: event for event in self.events}

    @property
    def equivocations(self) -> list[SignedEvent]:
        """Events of signers that also signed another event with the same predecessor, without the first of each."""
        seen, found = set(), []
        for event in self.events:
            place = (event.event.signer, event.event.previous)
            found += [event] if place in seen else []
            seen.add(place)
        return found

    @property
    def absent(self) -> list[str]:
        """Ids of events that others name but that are not in the bundle."""
        named = {one for event in self.events for one in _named(event.event)}
        return sorted(named - set(self.by_id))

    def of_kind(self, *kinds: Kind) -> list[SignedEvent]:
        """The events of some kinds, in order."""
        return [event for event in self.events if event.event.kind in kinds]

    @cached_property
    def canonical_record(self) -> dict[str, Any]:
        """What the run was and came to: from the events `published`, `updated` and `aggregated` alone.

        Updates count if the server has aggregated them. Strings and integers only; empty without events.
        """
        if not self.events:
            return {}
        first = self.events[0].event
        published = {(_round(event), event.event.content.get("copy")): event for event in self.of_kind("published")}
        aggregated = {_round(event): event for event in self.of_kind("aggregated")}
        rounds = []
        for place in sorted({place for place, _ in published} | set(aggregated)):
            copies = [event.event.digest for (at, _), event in published.items() if at == place]
            entry: dict[str, Any] = {"round": place, "copies": copies, "updates": []}
            if place in aggregated:
                event = aggregated[place].event
                entry |= {"updates": event.content.get("updates", []), "result": event.digest}
            rounds.append(entry)
        opening = next((event.event.content for event in self.of_kind("published")), {})
        results = [entry["result"] for entry in rounds if "result" in entry]
        used = [
            self.by_id[one].event for event in aggregated.values() for one in event.event.after if one in self.by_id
        ]
        clients = {event.signer: event.content.get("commitments", {}) for event in used if event.kind == "updated"}
        return {
            "schema_version": "1.0",
            "kind": "mpunlearn_run",
            "run": first.run,
            "server": {"key": first.server, "commitments": opening.get("commitments", {})},
            "clients": [{"key": key, "commitments": clients[key]} for key in sorted(clients)],
            **{key: opening[key] for key in ("software", "plan", "model", "base", "stand_in") if key in opening},
            "rounds": rounds,
            **({"result": results[-1]} if results else {}),
        }

    @property
    def reference(self) -> dict[str, str]:
        """How a later event refers to the run: the number of its record and the digest of its result."""
        return {"record": self.number, "result": str(self.canonical_record.get("result", ""))}

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the canonical record."""
        return digest(self.canonical_record)

    @property
    def number(self) -> str:
        """The number of the record. It is final when the run is complete."""
        return number(self.sha256)

    def state(self) -> dict[str, Any]:
        """The current state, in the form of the Pith open graph's state.json."""
        withdrawn = {(event.event.content.get("target"), event.event.signer) for event in self.of_kind("withdrawn")}
        current = {
            event.id: event.event.kind
            for event in self.of_kind("evaluated", "audited", "replicated")
            if (event.id, event.event.signer) not in withdrawn
        }
        whole = any((event.event.run, event.event.server) in withdrawn for event in self.events)
        return {
            "state_type": STATE_TYPE,
            "state_version": STATE_VERSION,
            "merge_version": MERGE_VERSION,
            "event_count": len(self.events) + len(self.invalid),
            "valid_event_count": len(self.events),
            "invalid_event_count": len(self.invalid),
            "equivocation_count": len(self.equivocations),
            "current": {
                "canonical_record": self.canonical_record,
                "record_number": self.number,
                "withdrawn": int(whole),
                **{
                    kind: [one for one in current if current[one] == kind]
                    for kind in ("evaluated", "audited", "replicated")
                },
            },
        }

    def to_bytes(self) -> bytes:
        """The content of the bundle's file."""
        return file_bytes(
            {
                "bundle_type": BUNDLE_TYPE,
                "bundle_version": BUNDLE_VERSION,
                "record_number": self.number,
                "short_record_number": self.number[:SHORT_CHARACTERS],
                "canonical_record": self.canonical_record,
                "canonical_sha256": self.sha256,
                "events": self.envelopes,
            }
        )


def _named(event: Event) -> list[str]:
    return [*event.after, *([event.previous] if event.previous else [])]


def _round(event: SignedEvent) -> int:
    """The round of an event; 0 if it has none."""
    return int(event.event.content.get("round", 0))


def _ordered(events: Mapping[str, SignedEvent]) -> list[SignedEvent]:
    """Events, each after those that it names; otherwise by time and id."""
    waiting = {key: {one for one in _named(event.event) if one in events} for key, event in events.items()}
    followers: dict[str, list[str]] = {key: [] for key in events}
    for key, names in waiting.items():
        for name in names:
            followers[name].append(key)
    ready = [(events[key].event.created_at, key) for key, names in waiting.items() if not names]
    heapq.heapify(ready)
    order = []
    while ready:
        _, key = heapq.heappop(ready)
        order.append(events[key])
        for follower in followers[key]:
            waiting[follower].discard(key)
            if not waiting[follower]:
                heapq.heappush(ready, (events[follower].event.created_at, follower))
    return order  # all of them: an event's id contains those that it names, so there is no circle
