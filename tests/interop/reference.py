"""What `postprocess` should give: θ plus the weighted mean of the reverted differences, one dense tensor at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.publisher import Publisher
from mpunlearn.server.state import ServerState


def reference(model: Path, state: Path, copies: Sequence[Path], trained: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The next θ, in float64, from checkpoints that were trained from the copies and saved in full."""
    source, server = Checkpoint(model), ServerState(state)
    architecture = Architecture.of(source)
    publisher = Publisher(server.secret, server.rounds[-1], architecture)
    result = {}
    for name, role in architecture.tensor_roles(source).items():
        value = source.read(name).double()
        for number, (copy, after) in enumerate(zip(copies, trained, strict=True)):
            published = publisher.maps[number].published_name(name, role)
            delta = Checkpoint(after).read(published).double() - Checkpoint(copy).read(published).double()
            for axis, axis_map in enumerate(publisher.maps[number].maps(role)):
                delta = axis_map.invert(delta, axis)
            value += float(publisher.design.weights[number]) * delta
        result[name] = value
    return result


def check(model: Path, state: Path, copies: list[Path], given: list[Path], trained: list[Path], out: Path) -> None:
    """Aggregates what a client hands back, and compares the result with the reference and with the model before."""
    expected = reference(model, state, copies, trained)
    result, before = Checkpoint(postprocess(given, state=state, out=out, dtype="float32")), Checkpoint(model)
    moved = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(result.read(name).double(), value, rtol=1e-5, atol=2e-6, msg=name)
        moved = max(moved, float((result.read(name) - before.read(name).float()).abs().max()))
    assert moved > 1e-4
