"""What a change of basis would do to a checkpoint, before anything is published."""

import math
from dataclasses import dataclass
from pathlib import Path

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import PlanError
from mpunlearn.server.reparameterization import STRENGTHS


@dataclass(frozen=True)
class Choice:
    """What one kind of space is secretly given, over the whole model."""

    space: str
    maps: str
    spaces: int
    """How many such spaces the model has."""
    bits: float
    """log2 of the number of permutations and signs."""
    angles: int
    """Dimension of the continuous choice: one per rotated plane, d(d-1)/2 per orthogonal d x d matrix."""


def choices(architecture: Architecture, strength: str) -> list[Choice]:
    """What a strength draws for one copy of a model, per kind of space."""
    if strength == "none":
        return []
    full, heads, family = strength == "full", architecture.heads, architecture.family
    layers = architecture.layers
    sparse = [layer for layer in range(layers) if architecture.experts and architecture.sparse(layer)]
    found = []
    if full:
        signs = architecture.residual if family.signs else 0
        maps = "permutation and signs" if signs else "permutation"
        found.append(Choice("residual", maps, 1, _log2_factorial(architecture.residual) + signs, 0))
    for space, expert, count in (
        ("ffn", False, layers - len(sparse)),
        ("ffn of an expert", True, len(sparse) * architecture.experts),
    ):
        if count:
            size = architecture.ffn(expert)
            signs = size if full and "ffn" in architecture.axis_roles else 0
            maps = "permutation and signs" if signs else "permutation"
            found.append(Choice(space, maps, count, count * (_log2_factorial(size) + signs), 0))
    groups, rest = layers * heads.groups, heads.dim - heads.rotary
    if family.query_key == "signs":
        found.append(Choice("query-key", "signs of planes", groups, groups * (heads.rotary // 2 + rest), 0))
    else:
        beside = rest * (rest - 1) // 2 if full else 0
        maps = "rotated RoPE planes" + (" and orthogonal beside them" if beside else "")
        found.append(Choice("query-key", maps, groups, 0, groups * (heads.rotary // 2 + beside)))
    if full:
        found.append(Choice("value", "orthogonal", groups, 0, groups * heads.dim * (heads.dim - 1) // 2))
        bits = layers * (_log2_factorial(heads.groups) + heads.groups * _log2_factorial(heads.per_group))
        found.append(Choice("heads", "permutation of groups, and of heads within a group", layers, bits, 0))
        if sparse:
            bits = len(sparse) * _log2_factorial(architecture.experts)
            found.append(Choice("experts", "permutation", len(sparse), bits, 0))
    else:
        shared = "the angles of query-key" if family.query_key == "rotations" and not rest else "rotated planes"
        own = 0 if shared.startswith("the") else groups * (heads.dim // 2)
        found.append(Choice("value", shared, groups, 0, own))
    return found


def _log2_factorial(n: int) -> float:
    return math.lgamma(n + 1) / math.log(2)


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
    architecture = Architecture.of(source)
    places = architecture.tensor_roles(source)
    entries = sum(info.nbytes // info.dtype.itemsize for name, info in source.tensors.items() if name in places)
    rows = [("space", "spaces", "maps", "bits", "angles")]
    found = choices(architecture, reparameterization)
    rows += [(c.space, f"{c.spaces:,}", c.maps, f"{c.bits:,.0f}", f"{c.angles:,}") for c in found]
    rows.append(("all", "", "", f"{sum(c.bits for c in found):,.0f}", f"{sum(c.angles for c in found):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    title = f"{source.path}: {source.config['model_type']}, {architecture.layers} layers, {entries:,} parameters"
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, *lines])
