"""Every target takes its seeds, damaged seeds, and all inputs that once found something."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.targets import TARGETS

CRASHERS = sorted((Path(__file__).parent / "crashers").glob("*-*"))


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_valid(name: str) -> None:
    target = TARGETS[name]
    if name != "index":  # its second seed is refused
        target.run(target.seeds[0])


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_input_is_refused_and_nothing_else(name: str, data) -> None:
    seed = data.draw(st.sampled_from(TARGETS[name].seeds))
    start = data.draw(st.integers(0, len(seed)))
    stop = data.draw(st.integers(start, min(len(seed), start + 20)))
    TARGETS[name](seed[:start] + data.draw(st.binary(max_size=20)) + seed[stop:])


@pytest.mark.parametrize("path", CRASHERS, ids=[path.name for path in CRASHERS])
def test_what_was_found_once_is_refused(path: Path) -> None:
    TARGETS[path.name.split("-")[0]](path.read_bytes())
