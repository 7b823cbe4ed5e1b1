"""Deadlines: when a client counts as late, with times given instead of waited for."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.server.network.deadlines import Deadlines

TIMES = st.floats(0, 1e6)


@given(started=TIMES, complete=TIMES, begun=TIMES, seconds=st.floats(1, 1e5), after=st.floats(0, 1e6))
def test_the_time_begins_with_whatever_came_last(
    started: float, complete: float, begun: float, seconds: float, after: float
) -> None:
    start = max(started, complete, begun)
    late = Deadlines(seconds, started).late([("a", 1)], complete=complete, begun=begun, now=start + after)
    if after > 1.001 * seconds:
        assert late == {"a": [1]}
    elif after < 0.999 * seconds:
        assert late == {}


@pytest.mark.parametrize(
    ("now", "expected"), [(99, {}), (101, {"a": [1, 3]}), (199, {"a": [1, 3]}), (201, {"a": [1, 3], "b": [2]})]
)
def test_a_client_whose_answer_could_not_be_fetched_has_twice_as_much_time(now: float, expected: dict) -> None:
    deadlines = Deadlines(100, 0)
    deadlines.excuse("b")
    missing = [("a", 1), ("b", 2), ("a", 3)]
    assert deadlines.late(missing, complete=0, begun=0, now=now) == expected


def test_waiting_for_clients_ends() -> None:
    assert not Deadlines(1000).waited_for_clients
    assert Deadlines(1000, time.time() - 1001).waited_for_clients
