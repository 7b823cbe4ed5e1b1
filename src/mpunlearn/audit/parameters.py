"""What is left of the server's noise to a client that holds some of a round's copies.

Both figures are lower bounds of what a client can learn: the distance of one copy once its reparameterization is undone, and
the noise that the best unbiased linear attack leaves to whoever pools several copies (`CopyDesign.floor`). Not covered: the
attacks themselves, which have to find the reparameterizations first.
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
    """How far a copy is from the server's model, to one who knows the copy's reparameterization."""

    equal: float
    """Share of weights that equal the server's."""
    relative: float
    """‖copy - θ‖ / ‖θ‖ over all weights."""


def copy_distance(model: str | Path, copy: str | Path, state: str | Path) -> CopyDistance:
    """The distance of the first copy of a run's first round.

    Args:
        model: θ, from which the round was published.
        copy: the published copy 1 of round 1.
        state: the server's state, which knows the reparameterization.
    """
    source, published, server = Checkpoint(model), Checkpoint(copy), ServerState(state)
    architecture = Architecture.of(source)
    maps = Publisher(server.secret, server.rounds[0], architecture).maps[0]
    equal = count = 0
    difference = norm = 0.0
    for name, place in architecture.tensor_roles(source).items():
        mine = source.read(name)
        theirs = maps.invert(place, published.read(maps.published_name(name, place)))
        equal += int((mine == theirs).sum())
        count += mine.numel()
        difference += float((mine - theirs).square().sum())
        norm += float(mine.square().sum())
    return CopyDistance(equal / count, math.sqrt(difference / norm))


def noise_floor(perturbation: Perturbation) -> list[float]:
    """The noise left, relative to the weights, to one who pools the first 1, 2, … m copies of a round.

    Computed for α = 1, the least noise that a copy can have.
    """
    design = perturbation.design(perturbation.scales(None))
    return [math.sqrt(design.floor(list(range(held)))) * perturbation.kappa for held in range(1, design.copies + 1)]
