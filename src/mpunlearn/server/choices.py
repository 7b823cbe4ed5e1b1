"""How much secret choice a reparameterization makes for one copy of a model."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpunlearn.server.perturbation import Strength

if TYPE_CHECKING:
    from mpunlearn.architecture import Architecture


@dataclass(frozen=True)
class Choice:
    """The secret choice in one kind of space, over the whole model."""

    space: str
    maps: str
    spaces: int
    """How many such spaces the model has."""
    bits: float
    """log2 of the number of permutations and signs."""
    angles: int
    """Dimension of the continuous choice: one per rotated plane, d(d-1)/2 per orthogonal d x d matrix."""


def choices(architecture: "Architecture", strength: Strength) -> list[Choice]:
    """What a strength draws for one copy of a model, per kind of space."""
    if strength == "none":
        return []
    full, heads, family = strength == "full", architecture.heads, architecture.family
    layers = architecture.layers
    sparse = [layer for layer in range(layers) if architecture.experts and architecture.sparse(layer)]
    rows = []
    if full:
        signs = architecture.residual if family.signs else 0
        maps = "permutation and signs" if signs else "permutation"
        rows.append(Choice("residual", maps, 1, _log2_factorial(architecture.residual) + signs, 0))
    for space, expert, count in (
        ("ffn", False, layers - len(sparse)),
        ("ffn of an expert", True, len(sparse) * architecture.experts),
    ):
        if count:
            size = architecture.ffn(expert)
            signs = size if full and "ffn" in architecture.axis_roles else 0
            maps = "permutation and signs" if signs else "permutation"
            rows.append(Choice(space, maps, count, count * (_log2_factorial(size) + signs), 0))
    groups, rest = layers * heads.groups, heads.dim - heads.rotary
    if family.query_key == "signs":
        rows.append(Choice("query-key", "signs of planes", groups, groups * (heads.rotary // 2 + rest), 0))
    else:
        beside = rest * (rest - 1) // 2 if full else 0
        maps = "rotated RoPE planes" + (" and orthogonal beside them" if beside else "")
        rows.append(Choice("query-key", maps, groups, 0, groups * (heads.rotary // 2 + beside)))
    if full:
        rows.append(Choice("value", "orthogonal", groups, 0, groups * heads.dim * (heads.dim - 1) // 2))
        bits = layers * (_log2_factorial(heads.groups) + heads.groups * _log2_factorial(heads.per_group))
        rows.append(Choice("heads", "permutation of groups, and of heads within a group", layers, bits, 0))
        if sparse:
            bits = len(sparse) * _log2_factorial(architecture.experts)
            rows.append(Choice("experts", "permutation", len(sparse), bits, 0))
    else:
        shared = "the angles of query-key" if family.query_key == "rotations" and not rest else "rotated planes"
        own = 0 if shared.startswith("the") else groups * (heads.dim // 2)
        rows.append(Choice("value", shared, groups, 0, own))
    return rows


def _log2_factorial(n: int) -> float:
    return math.lgamma(n + 1) / math.log(2)
