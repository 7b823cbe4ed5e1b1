"""The roster: who may take part, and what of it survives a restart."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.errors import MessageError
from mpunlearn.protocol.messages import Hello
from mpunlearn.server.network import roster as module
from mpunlearn.server.network.roster import LostClientError, Roster

RUN = "0" * 32
ALICE, BOB, EVE = ("a" * 64, "b" * 64, "e" * 64)


def answer(roster: Roster, node: str, client: str) -> list[str]:
    """A node is challenged and answers for a client."""
    challenge = roster.challenge(node, RUN)
    assert challenge is not None
    return roster.enroll(Hello(RUN, challenge.nonce, node), RUN, node, client)


def test_clients_come_in_order_and_are_still_there_after_a_restart(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "clients.json", [], 2)
    assert roster.complete_since is None
    assert answer(roster, "1", BOB) == []
    assert roster.complete_since is None
    assert answer(roster, "2", ALICE) == []
    assert roster.complete_since is not None
    again = Roster(tmp_path / "clients.json", [], 2)
    assert again.clients == roster.clients == [BOB, ALICE]
    assert again.nodes == {"1": BOB, "2": ALICE}
    assert again.complete_since == roster.complete_since
    assert again.client_of("1") == BOB
    assert again.node_of(ALICE) == "2"
    assert again.node_of(EVE) is None


def test_a_client_may_move_to_another_node(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "clients.json", [ALICE, BOB], 2)
    answer(roster, "1", ALICE)
    assert answer(roster, "7", ALICE) == ["1"]
    assert roster.nodes == {"7": ALICE}
    assert roster.clients == [ALICE, BOB]


def test_strangers_are_refused(tmp_path: Path) -> None:
    trusting = Roster(tmp_path / "trusted.json", [ALICE], 1)
    with pytest.raises(MessageError, match="does not belong"):
        answer(trusting, "1", EVE)
    first_come = Roster(tmp_path / "first.json", [], 1)
    answer(first_come, "1", ALICE)
    with pytest.raises(MessageError, match="does not belong"):
        answer(first_come, "2", EVE)
    assert first_come.clients == [ALICE]
    assert "2" not in first_come.nodes


@pytest.mark.parametrize(
    "hello",
    [Hello("1" * 32, "{nonce}", "1"), Hello(RUN, "0" * 32, "1"), Hello(RUN, "{nonce}", "2")],
    ids=["another run", "another nonce", "another node"],
)
def test_an_answer_must_be_to_this_challenge(hello: Hello, tmp_path: Path) -> None:
    roster = Roster(tmp_path / "clients.json", [ALICE], 1)
    challenge = roster.challenge("1", RUN)
    assert challenge is not None
    hello = Hello(hello.run, hello.nonce.format(nonce=challenge.nonce), hello.node)
    with pytest.raises(MessageError, match="a different challenge"):
        roster.enroll(hello, RUN, "1", ALICE)
    assert roster.nodes == {}


def test_a_node_is_challenged_once_and_again_only_after_a_while(tmp_path: Path, monkeypatch) -> None:
    roster = Roster(tmp_path / "clients.json", [ALICE], 1)
    first = roster.challenge("1", RUN)
    assert first is not None
    assert roster.challenge("1", RUN) is None
    assert Roster(tmp_path / "clients.json", [ALICE], 1).challenge("1", RUN) is None
    roster.refuse_answer("1")
    assert roster.challenge("1", RUN) is None
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    second = roster.challenge("1", RUN)
    assert second is not None
    assert second.nonce != first.nonce
    roster.keep_challenges(set())  # it was lost in a crash
    assert roster.challenge("1", RUN) is not None


def test_clients_are_dropped_together_or_not_at_all(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "clients.json", [ALICE, BOB, EVE], 3)
    for quorum in (None, 2):
        with pytest.raises(LostClientError, match=f"{ALICE[:16]} is late; client {BOB[:16]} is late, too"):
            roster.drop({ALICE: "is late", BOB: "is late, too"}, quorum)
        assert roster.active == [ALICE, BOB, EVE]
    roster.drop({BOB: "is late"}, 2)
    again = Roster(tmp_path / "clients.json", [ALICE, BOB, EVE], 3)
    assert again.active == [ALICE, EVE]
    assert again.clients == [ALICE, BOB, EVE]  # numbers and weights of the others stay
    assert again.dropped == {BOB: "is late"}


@given(clients=st.integers(1, 5), copies=st.integers(1, 5), dropped=st.sets(st.integers(0, 4)))
def test_every_active_client_has_every_copy_or_one_of_its_own(clients: int, copies: int, dropped: set[int]) -> None:
    import tempfile

    keys = [f"{number:064x}" for number in range(clients)]
    gone = {keys[number]: "left" for number in dropped if number < clients}
    with tempfile.TemporaryDirectory() as folder:
        roster = Roster(Path(folder) / "clients.json", keys, clients)
        roster.drop(gone, 0)
        left = [key for key in keys if key not in gone]
        assert roster.pairs("all", copies) == [(key, copy + 1) for key in left for copy in range(copies)]
        one = roster.pairs("one", copies)
        assert len({key for key, _ in one}) == len({copy for _, copy in one}) == len(one) == min(len(left), copies)
