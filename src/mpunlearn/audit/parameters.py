"""How well the noise hides the server's parameters from a client that holds some copies of a round.

Both measures assume that the client has already undone the reparameterizations: the distance between one copy and the
server's model, and the noise that remains after the best linear unbiased combination of several copies
(`CopyDesign.floor`). Not covered: attacks that recover the reparameterizations.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.server.perturbation import Perturbation
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


def noise_floor(perturbation: Perturbation) -> list[float]:
    """The noise that remains, relative to the weights, when an attacker combines the first 1, 2, … m copies of a round.

    Computed for α = 1, the smallest possible noise scale.
    """
    design = perturbation.design(perturbation.scales(None))
    return [math.sqrt(design.floor(list(range(held)))) * perturbation.kappa for held in range(1, design.copies + 1)]
