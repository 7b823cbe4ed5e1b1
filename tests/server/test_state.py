"""The server's state: what a round pins, what an interruption leaves, and which files it reads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mpunlearn.errors import StateError
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.state import RoundingLeakage, RoundRecord, ServerState, inputs_digest, locked


def record(number: int = 1, **changes) -> RoundRecord:
    plain = RoundRecord(
        round=number,
        checkpoint="model",
        digests={"w": ["0" * 64]},
        base=None,
        dtypes={"w": "float32"},
        perturbation=Perturbation(copies=2, alphas=(1.0, 2.0)),
        inputs="1" * 64,
        alphas=[1.0, 2.0],
        sigma={"w": 0.01},
    )
    return replace(plain, **changes)


def publish(path: Path, round_record: RoundRecord) -> ServerState:
    """What `preprocess` does, without the copies."""
    state = ServerState(path / "state")
    with state.opened(round_record, path / "copies"):
        pass
    return state


def test_what_was_written_is_read(tmp_path: Path) -> None:
    state = publish(tmp_path, record())
    state.measured({"w": RoundingLeakage(0.25, 3.5)})
    again = ServerState(tmp_path / "state")
    assert again.run == state.run
    assert again.rounds == state.rounds == [record(rounding={"w": RoundingLeakage(0.25, 3.5)})]
    assert again.secret.stream("x").read(16) == state.secret.stream("x").read(16)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "state").iterdir())


def test_rounds_follow_one_another(tmp_path: Path) -> None:
    state = publish(tmp_path, record())
    assert (state.open_round, state.next_round) == (state.rounds[0], 1)
    state.close()
    assert (state.open_round, state.next_round) == (None, 2)
    publish(tmp_path, record(2))
    assert [entry.closed for entry in ServerState(tmp_path / "state").rounds] == [True, False]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"digests": {"w": ["2" * 64]}}, "a different checkpoint"),
        ({"base": "2" * 64}, "a different base"),
        ({"perturbation": Perturbation(copies=3)}, "different options"),
    ],
)
def test_an_open_round_takes_no_other_inputs(tmp_path: Path, change: dict, why: str) -> None:
    publish(tmp_path, record())
    with pytest.raises(StateError, match=f"round 1 is open with {why}"):
        publish(tmp_path, record(**change))
    state = ServerState(tmp_path / "state")
    with state.opened(record(checkpoint="elsewhere"), tmp_path / "copies") as pinned:
        assert pinned == record()  # the same inputs, moved: published from the pinned record


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_publication_is_forgotten_unless_copies_are_out(tmp_path: Path, exists: bool) -> None:
    for number in (1, 2):
        state = ServerState(tmp_path / "state")
        out = tmp_path / f"copies-{number}"
        with pytest.raises(KeyboardInterrupt), state.opened(record(number), out):
            if exists:
                out.mkdir()
            raise KeyboardInterrupt
        kept = ServerState(tmp_path / "state").rounds if (tmp_path / "state").exists() else []
        assert len(kept) == (number if exists else number - 1)
        if not exists:
            publish(tmp_path, record(number))
        ServerState(tmp_path / "state").close()


def test_records_of_format_1_are_read(tmp_path: Path) -> None:
    """0.1.0 kept options and leakage under other names, and computed the name of the streams when it was needed."""
    publish(tmp_path, record())
    file = tmp_path / "state" / "round-001.json"
    content = json.loads(file.read_text())
    settings = content.pop("perturbation")
    for name in ("format", "inputs", "rounding"):
        content.pop(name)
    file.write_text(json.dumps({**content, "settings": settings, "honesty": {"w": [0.25, 3.5]}}))
    (old,) = ServerState(tmp_path / "state").rounds
    inputs = inputs_digest(1, content["digests"], None, content["dtypes"], settings)
    assert old == record(inputs=inputs, rounding={"w": RoundingLeakage(0.25, 3.5)})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda state: (state / "state.json").unlink(), "not a valid server state"),
        (lambda state: (state / "state.json").write_text('{"run": "x", "format": 2}'), "upgrade mpunlearn"),
        (lambda state: (state / "round-001.json").write_text("{"), "cannot be read as JSON"),
        (lambda state: (state / "round-001.json").rename(state / "round-002.json"), None),
        (lambda state: (state / "round-001.json").write_text('{"format": 4}'), "upgrade mpunlearn"),
        (lambda state: (state / "round-001.json").write_text('{"format": 2, "round": 1}'), "missing field"),
        (lambda state: (state / "secret.key").unlink(), "secret.key"),
        (lambda state: state.chmod(0o755), "chmod 700"),
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, damage, why: str | None) -> None:
    publish(tmp_path, record())
    damage(tmp_path / "state")
    if why is None:  # a gap in the numbers: round 1 is missing
        (tmp_path / "state" / "round-002.json").write_text(
            (tmp_path / "state" / "round-002.json").read_text().replace('"round": 1', '"round": 2')
        )
        why = "is the record of round 2, expected round 1"
    with pytest.raises(StateError, match=why):
        ServerState(tmp_path / "state")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "nothing"),
        locked(tmp_path),
        pytest.raises(StateError, match="another process"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass
