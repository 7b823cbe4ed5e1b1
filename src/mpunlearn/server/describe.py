"""Lists what the reparameterization of a checkpoint would change, without publishing anything."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.files import as_path
from mpunlearn.server.choices import Choice, choices
from mpunlearn.server.perturbation import Strength
from mpunlearn.tables import aligned


@dataclass(frozen=True)
class Description:
    """A model, and the secret maps that one copy of it would draw."""

    checkpoint: str
    family: str
    layers: int
    parameters: int
    choices: list[Choice]

    def table(self) -> str:
        """The description as text."""
        rows = [(c.space, f"{c.spaces:,}", c.maps, f"{c.bits:,.0f}", f"{c.angles:,}") for c in self.choices]
        bits, angles = sum(c.bits for c in self.choices), sum(c.angles for c in self.choices)
        rows.append(("all", "", "", f"{bits:,.0f}", f"{angles:,}"))
        title = f"{self.checkpoint}: {self.family}, {self.layers} layers, {self.parameters:,} parameters"
        return f"{title}\n{aligned(('space', 'spaces', 'maps', 'bits', 'angles'), rows)}"

    def to_json(self) -> dict[str, Any]:
        """The description as JSON."""
        return dataclasses.asdict(self)


def describe(checkpoint: str | Path, *, reparameterization: Strength = "full") -> Description:
    """Lists the hidden spaces of a model and the secret maps that the reparameterization of one copy would draw.

    The bits column is log2 of the number of possible permutations and signs; the angles column is the number of
    rotation parameters. Neither measures the cost of an attack: an attacker who can align a copy with a public base
    model recovers the maps without guessing.

    Args:
        checkpoint: The server's model, a Hugging Face checkpoint directory.
        reparameterization: Strength of the reparameterization: full, paper or none.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        UnsupportedModelError: The model's family or number format cannot be handled exactly.
    """
    from mpunlearn.architecture import Architecture
    from mpunlearn.checkpoint import Checkpoint

    source = Checkpoint(as_path(checkpoint, "checkpoint"))
    architecture = Architecture.of(source)
    roles = architecture.tensor_roles(source)
    parameters = sum(info.nbytes // info.dtype.itemsize for name, info in source.tensors.items() if name in roles)
    family = str(source.config["model_type"])
    return Description(
        str(source.path), family, architecture.layers, parameters, choices(architecture, reparameterization)
    )
