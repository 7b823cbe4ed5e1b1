"""Merging: the same events give the same bytes, whoever merges them, and two stories of one signer are noticed."""

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.record.signers import CLIENT, RUN, SERVER, event, small_run

from mpunlearn.errors import RecordError
from mpunlearn.protocol.record.artifacts import FileDigest
from mpunlearn.protocol.record.bundle import Bundle
from mpunlearn.protocol.record.events import SignedEvent
from mpunlearn.protocol.record.log import Log
from mpunlearn.record import add, merge, show, verify

STORY = [one.envelope for one in small_run()]
FORK = event(CLIENT, "updated", None, small_run()[0], files=[FileDigest("update.safetensors", "ef" * 32)]).envelope
BROKEN = {**STORY[0], "payload": STORY[1]["payload"]}
ALL = [*STORY, FORK, BROKEN, "no envelope"]


@settings(max_examples=25, deadline=None)
@given(st.permutations(ALL), st.lists(st.sampled_from(ALL)), st.integers(0, len(ALL)))
def test_any_order_repetition_and_grouping_gives_the_same_bytes(order, again, cut) -> None:
    expected = Bundle.of(ALL).to_bytes()
    assert Bundle.of([*order, *again]).to_bytes() == expected
    left, right = Bundle.of([*order[:cut], *again]), Bundle.of(order[cut:])
    assert left.merged(right).to_bytes() == right.merged(left).to_bytes() == expected


def test_of_two_signatures_of_one_event_the_same_is_kept_in_any_order() -> None:
    """Whoever has the key can sign one statement in more than one valid way."""
    one = small_run()[0]
    other = SignedEvent(one.event, {**one.envelope, "signatures": [{"keyid": "0", "sig": "AA=="}]})
    left, right = Bundle([one], []), Bundle([other], [])
    assert left.merged(right).to_bytes() == right.merged(left).to_bytes()
    assert left.to_bytes() != right.to_bytes()


def test_the_state_counts_what_is_wrong() -> None:
    state = Bundle.of(ALL).state()
    counts = [state[f"{name}event_count"] for name in ("", "valid_", "invalid_")]
    assert counts == [8, 6, 2]
    assert state["equivocation_count"] == 1
    assert Bundle.of(STORY).state()["equivocation_count"] == 0


def test_events_come_after_those_that_they_name() -> None:
    bundle, seen = Bundle.of(reversed(STORY)), set()
    for one in bundle.events:
        assert {*one.event.after, *([one.event.previous] if one.event.previous else [])} <= seen
        seen.add(one.id)
    assert [one.event.kind for one in bundle.events].count("updated") == 2
    assert bundle.absent == []
    assert Bundle.of(STORY[2:]).absent != []


def test_the_record_depends_on_the_run_alone() -> None:
    bundle = Bundle.of(STORY)
    later = event(SERVER, "evaluated", bundle.events[-1], content={"record": bundle.number})
    assert bundle.merged(Bundle([later], [])).number == bundle.number
    assert Bundle.of(STORY[:-1]).number != bundle.number
    record = bundle.canonical_record
    assert record["result"] == bundle.events[-1].event.digest
    assert record["clients"] == [{"key": CLIENT.public, "commitments": {"forget": "cd" * 32}}]
    assert [len(record["rounds"][0][name]) for name in ("copies", "updates")] == [2, 2]


def test_an_update_that_the_server_did_not_use_changes_nothing() -> None:
    """A stranger can sign an update, but not put it into the record."""
    bundle = Bundle.of(STORY)
    stranger = event(SERVER, "updated", bundle.events[-1], content={"round": 1, "copy": 1})
    assert bundle.merged(Bundle([stranger], [])).number == bundle.number


def test_runs_do_not_mix() -> None:
    other = event(run="f" * 32)
    with pytest.raises(RecordError, match="2 different runs"):
        Bundle.of([*STORY, other.envelope])


def test_a_log_neither_loses_nor_doubles_an_event(tmp_path) -> None:
    log, files = Log(tmp_path / "record.json", SERVER, RUN, SERVER.public), [FileDigest("a", "ab" * 32)]
    first = log.append("published", files, {"round": 1, "copy": 1})
    assert log.append("published", files, {"round": 1, "copy": 1}) == first
    second = log.append("published", files, {"round": 1, "copy": 2})
    assert second.event.previous == first.id
    assert [one.id for one in log.bundle.events] == [first.id, second.id]


def test_programs_that_append_at_once_make_one_chain(tmp_path) -> None:
    def work(number: int) -> None:
        log = Log(tmp_path / "record.json", SERVER, RUN, SERVER.public)
        for copy in range(5):
            log.append("published", [FileDigest("a", "ab" * 32)], {"round": number, "copy": copy})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bundle = Bundle.read(tmp_path / "record.json")
    assert len(bundle.events) == 20
    assert bundle.equivocations == []


def test_events_are_added_and_withdrawn_by_their_signers_only(tmp_path) -> None:
    path, result = tmp_path / "record.json", tmp_path / "result.json"
    path.write_bytes(Bundle.of(STORY).to_bytes())
    result.write_text("{}")
    number = Bundle.read(path).number
    done = add(path, "evaluated", file=result, key=tmp_path / "a.key", note="looks fine")
    other = add(path, "replicated", key=tmp_path / "b.key")
    add(path, "withdrawn", key=tmp_path / "b.key", target=done)
    current = show(path).to_json()["current"]
    assert (current["evaluated"], current["replicated"]) == ([done], [other])  # not b's to withdraw
    add(path, "withdrawn", key=tmp_path / "a.key", target=done)
    state = show(path).to_json()
    assert state["current"]["evaluated"] == []
    assert state["current"]["record_number"] == number
    assert state["valid_event_count"] == 9
    assert "looks fine" in show(path).text()
    assert verify([path]).to_json()["valid"]
    for wrong in ({"kind": "evaluated"}, {"kind": "withdrawn"}, {"kind": "replicated", "target": done}):
        with pytest.raises(RecordError):
            add(path, **wrong)
    with pytest.raises(RecordError, match="no identity.key beside it"):
        add(path, "replicated")


def test_merged_files_are_records(tmp_path) -> None:
    for name, part in (("a", STORY[:3]), ("b", STORY[2:])):
        (tmp_path / name).write_bytes(Bundle.of(part).to_bytes())
    both = merge([tmp_path / "b", tmp_path / "a"], out=tmp_path / "record.json")
    assert both.read_bytes() == Bundle.of(STORY).to_bytes()
    assert json.loads(both.read_text())["record_number"] == Bundle.of(STORY).number


def test_a_fork_does_not_verify(tmp_path) -> None:
    (tmp_path / "record.json").write_bytes(Bundle.of([*STORY, FORK]).to_bytes())
    with pytest.raises(RecordError, match="equivocation"):
        verify([tmp_path])
