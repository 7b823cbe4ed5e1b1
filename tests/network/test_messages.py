"""Sealed messages and the keys that sign them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.network.federation import TRAINING
from tests.network.forgery import Scene, honest, result

from mpunlearn.errors import MessageError
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.messages import Job, Result, Sealed


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=400), prefix=st.sampled_from([b"", b"MPU1", b"MPU1\x10\0\0\0{"]))
def test_bytes_that_are_no_message_are_refused_and_nothing_else(data: bytes, prefix: bytes) -> None:
    from mpunlearn.errors import MessageError

    with pytest.raises(MessageError):
        Sealed.open(prefix + data)


def test_messages_survive_the_round_trip(tmp_path: Path) -> None:
    from mpunlearn.protocol.messages import File, seal

    identity = Identity.at(tmp_path / "key")
    job = Job(
        "0" * 32, "1" * 64, 1, 2, 1, 3, TRAINING.to_json(), [File("config.json", 3, "0" * 64, "s3://b/k")], ["s3://b/s"]
    )
    for message in (job, Result("0" * 32, "2" * 64, refusal="näh")):
        opened = Sealed.open(seal(message, identity), identity.public)
        assert opened.message == message
        assert opened.sender == identity.public


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    from mpunlearn.errors import StateError

    first = Identity.at(tmp_path / "key")
    assert Identity.at(tmp_path / "key").public == first.public
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(StateError, match="chmod 600"):
        Identity.at(tmp_path / "key")


def test_a_message_for_one_kind_is_no_other(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    data = result(net, honest(net, tmp_path / "honest"))
    with pytest.raises(MessageError, match="signed by"):
        Sealed.open(data, net.coordinator.identity.public)
