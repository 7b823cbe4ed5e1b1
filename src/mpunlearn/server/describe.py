"""What a change of basis would do to a checkpoint, before anything is published."""

from pathlib import Path

from mpunlearn.architecture import FAMILIES
from mpunlearn.architecture.spaces import architecture_of
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import PlanError
from mpunlearn.server.reparameterization import STRENGTHS, choices


def describe(checkpoint: str | Path, *, reparameterization: str = "full") -> str:
    """A table of the model's hidden spaces, the maps each is given, and how much secret choice that is for one copy.

    Bits count permutations and signs (log2 of their number); angles are the dimensions of the rotations, counted apart.
    Neither says what an attack needs: a party that can align a copy to a public base undoes them without guessing.

    Args:
        checkpoint: a checkpoint directory.
        reparameterization: full, paper or none.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        UnsupportedModelError: its family or number format has no exact handling.
    """
    if reparameterization not in STRENGTHS:
        raise PlanError(f"--reparameterization: expected one of {', '.join(STRENGTHS)}, found {reparameterization}")
    source = Checkpoint(checkpoint)
    architecture = architecture_of(source, FAMILIES)
    places = architecture.places(source)
    entries = sum(info.nbytes // info.dtype.itemsize for name, info in source.tensors.items() if name in places)
    rows = [("space", "spaces", "maps", "bits", "angles")]
    found = choices(architecture, reparameterization)
    rows += [(c.space, f"{c.spaces:,}", c.maps, f"{c.bits:,.0f}", f"{c.angles:,}") for c in found]
    rows.append(("all", "", "", f"{sum(c.bits for c in found):,.0f}", f"{sum(c.angles for c in found):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    title = f"{source.path}: {source.config['model_type']}, {architecture.layers} layers, {entries:,} parameters"
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, *lines])
