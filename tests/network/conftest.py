"""One tiny world for all tests of a module, and a run at the moment when one job is out."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers.trainer  # noqa: F401 (slow to import; what a worker forks then has it)
from tests.network.federation import Net, tiny_world
from tests.network.forgery import Scene
from tests.network.stage import Stage

from mpunlearn import Training
from mpunlearn.protocol.messages import Challenge, Sealed


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Model, forget file, retain file."""
    root = tmp_path_factory.mktemp("world")
    return (root / "model", *tiny_world(root))


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    root = tmp_path_factory.mktemp("scene")
    files = tiny_world(root)

    def build(folder: Path) -> Net:
        training = Training(objective="simnpo", epochs=1, batch_size=4, learning_rate=1e-3)
        return Net(folder, root / "model", [files[0]], files[1], rounds=1, copies=2, training=training)

    net = build(root / "start")
    while not net.coordinator.jobs.open:
        net.coordinator.step()
        net.carry()
        for file in (net.spool(0) / "jobs").iterdir():
            if isinstance(Sealed.open(file.read_bytes()).message, Challenge):
                net.workers[0].step()
        net.carry()
    return Scene(root / "start", build)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    try:
        yield stage
    finally:
        stage.stop()
