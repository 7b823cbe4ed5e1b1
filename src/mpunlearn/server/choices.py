"""The size of the space from which the reparameterization of a copy is drawn."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpunlearn.server.perturbation import Strength

if TYPE_CHECKING:
    from mpunlearn.architecture import Architecture


@dataclass(frozen=True)
class Choice:
    """The secret maps of one kind of hidden space, over the whole model."""

    space: str
    maps: str
    spaces: int
    """Number of spaces of this kind in the model."""
    bits: float
    """log2 of the number of possible permutations and signs."""
    angles: int
    """Number of rotation parameters: one per rotated plane, d(d-1)/2 per orthogonal d x d matrix."""


def choices(architecture: "Architecture", strength: Strength) -> list[Choice]:
    """Lists, per kind of hidden space, the maps that a reparameterization of this strength draws for one copy."""
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
        rest_angles = rest * (rest - 1) // 2 if full else 0
        maps = "rotated RoPE planes" + (", orthogonal on the rest" if rest_angles else "")
        rows.append(Choice("query-key", maps, groups, 0, groups * (heads.rotary // 2 + rest_angles)))
    if full:
        rows.append(Choice("value", "orthogonal", groups, 0, groups * heads.dim * (heads.dim - 1) // 2))
        bits = layers * (_log2_factorial(heads.groups) + heads.groups * _log2_factorial(heads.per_group))
        rows.append(Choice("heads", "permutation of KV groups, and of heads within each", layers, bits, 0))
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
