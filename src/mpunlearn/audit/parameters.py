"""How far one copy is from the server's model, once the server has undone its reparameterization.

Not covered: attacks that recover the reparameterizations (`audit`).
"""

import math
from dataclasses import dataclass
from pathlib import Path

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.server.publisher import Publisher
from mpunlearn.server.state import ServerState


@dataclass(frozen=True)
class CopyDistance:
    """The distance between a copy and the server's model, with the reparameterization of the copy undone."""

    equal: float
    """Share of weights that equal those of the server's model."""
    relative: float
    """‖copy - θ‖ / ‖θ‖ over all weights."""


def copy_distance(model: str | Path, copy: str | Path, state: str | Path) -> CopyDistance:
    """Computes the distance of copy 1 of round 1 from the server's model.

    Args:
        model: θ, the model that the round was published from.
        copy: the published copy 1 of round 1.
        state: the server's state, which determines the reparameterization.
    """
    source, published, server = Checkpoint(model), Checkpoint(copy), ServerState(state)
    architecture = Architecture.of(source)
    maps = Publisher(server.secret, server.rounds[0], architecture).maps[0]
    equal = count = 0
    difference = norm = 0.0
    for name, role in architecture.tensor_roles(source).items():
        original = source.read(name)
        aligned = maps.invert(role, published.read(maps.published_name(name, role)))
        equal += int((original == aligned).sum())
        count += original.numel()
        difference += float((original - aligned).square().sum())
        norm += float(original.square().sum())
    return CopyDistance(equal / count, math.sqrt(difference / norm))
