"""Alignment: recovers the map between two reparameterized versions of a model from their weights alone.

Every published copy is T_k(θ + ε_k) with its own secret map T_k. Whoever wants to compare copies, or a copy with a
public base model, must first undo the maps up to a common one. That is possible because the maps are orthogonal: they
leave inner products unchanged, so rows that belong together still correlate, however the axes were permuted, flipped or
rotated. `align` estimates the map space by space from such correlations, for every model family through its table:

1. the signed permutation of the residual stream, first from embedding and LM head (whose other axis never moves), later
   from all weights;
2. the signed permutation of each FFN's hidden channels;
3. the order of experts, from the router;
4. in each attention layer: the maps of queries and keys as complex numbers, one per RoPE plane (Procrustes in the
   entries that RoPE leaves alone), values and outputs by Procrustes, groups and heads by assignment.

Each weight counts with 1/RMS². The estimate of one space sharpens those of the others, so everything is repeated.
`matching` has the estimates of 2 to 4. If two copies carry noise that is zero-sum, it is anti-correlated, and the
correlations of the residual stream are E[C] = T P with the permutation P and T = G - xI, where G is the Gram matrix of
the reference. The unknown x is found by trial: the right one makes T⁻¹C look most like a signed permutation.

Not covered: scalings, which `architecture.spaces` excludes, and noise so strong that matching fails (at about 50 to 100 %
of the weights).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mpunlearn.architecture import Architecture
from mpunlearn.audit.matching import Rows, assign, attention, flattened, hidden, signs
from mpunlearn.audit.weights import Model, Piece, rms
from mpunlearn.server.axis_map import IDENTITY, AxisMap
from mpunlearn.server.role_maps import HeadOrder, RoleMaps

PASSES = 3
"""How often all spaces are estimated."""
DEBIASING = (0.0, *np.geomspace(4e-3, 1.6, 12))
"""Trial values of x, relative to the number of rows with an entry in the residual stream."""
DAMPING = (1e-4, 1e-2, 1e-1, 1.0)
"""Trial values of the damping of T⁻¹, relative to the median of T's squared eigenvalues."""
CLEAR = 0.8
"""A matching this close to a pure signed permutation (1) needs no further trials."""
Pieces = dict[tuple[str, int, int | None, int | None], Piece]


@dataclass(frozen=True, eq=False)
class Parts:
    """The estimated map of each hidden space; spaces that are not listed keep the identity."""

    residual: AxisMap = IDENTITY
    hidden: dict[tuple[int | None, int | None], AxisMap] = field(default_factory=dict)
    """By layer and expert of the reference."""
    experts: dict[int | None, AxisMap] = field(default_factory=dict)
    query_key: dict[int | None, AxisMap] = field(default_factory=dict)
    value: dict[int | None, AxisMap] = field(default_factory=dict)
    heads: dict[int | None, HeadOrder] = field(default_factory=dict)


class Alignment(RoleMaps):
    """An estimate of the map T for which a copy is T(reference), up to noise.

    Args:
        architecture: the architecture of both models.
        parts: the map of each hidden space (default: the identity).
    """

    def __init__(self, architecture: Architecture, parts: Parts | None = None) -> None:
        super().__init__(architecture)
        self._parts = parts or Parts()

    def tensor(self, copy: Model, name: str) -> torch.Tensor:
        """A tensor of a copy in the coordinates of the reference, float64.

        Args:
            copy: the copy that was aligned.
            name: name of the tensor in the reference.
        """
        role = copy.role(name)
        return self.invert(role, copy.weights[self.published_name(name, role)].double())

    def aligned(self, copy: Model) -> Model:
        """A copy in the coordinates of the reference."""
        weights = {name: self.tensor(copy, name).to(value.dtype) for name, value in copy.weights.items()}
        return Model(copy.architecture, weights)

    def counterpart(self, copy: Pieces, piece: Piece, keep: Sequence[str]) -> torch.Tensor:
        """The piece of the copy that corresponds to a piece of the reference, inverted along all axes but some.

        Args:
            copy: the pieces of the copy.
            piece: a piece of the reference.
            keep: roles of the axes that stay in the coordinates of the copy.
        """
        expert = piece.expert
        if expert is not None and (inverse := self._experts(piece.layer).inverse) is not None:
            expert = int(inverse[expert])
        value = copy[piece.template, piece.part, piece.layer, expert].value
        for axis, role in enumerate(piece.roles):
            if role not in keep:
                value = self._cached((role,), piece.layer, piece.expert).invert(value, axis)
        return value

    def _residual(self) -> AxisMap:
        return self._parts.residual

    def _hidden(self, layer: int | None, expert: int | None) -> AxisMap:
        return self._parts.hidden.get((layer, expert), IDENTITY)

    def _experts(self, layer: int | None) -> AxisMap:
        return self._parts.experts.get(layer, IDENTITY)

    def _query_key(self, layer: int | None) -> AxisMap:
        return self._parts.query_key.get(layer, IDENTITY)

    def _value(self, layer: int | None) -> AxisMap:
        return self._parts.value.get(layer, IDENTITY)

    def _head_order(self, layer: int | None) -> HeadOrder | None:
        return self._parts.heads.get(layer)


def align(reference: Model, copy: Model, start: Alignment | None = None, passes: int = PASSES) -> Alignment:
    """Estimates the map T for which `copy` is T(`reference`), up to noise.

    Args:
        reference: the model whose coordinates are the common ones.
        copy: a model of the same architecture.
        start: an estimate to begin with (default: none).
        passes: how often all spaces are estimated; each time, the previous estimate provides more evidence.
    """
    architecture, theirs = reference.architecture, copy.pieces()
    layers: dict[int | None, list[Piece]] = {}
    for piece in reference.pieces().values():
        layers.setdefault(piece.layer, []).append(piece)
    alignment = start
    for _ in range(passes):
        parts = Parts(_residual(architecture, layers, theirs, alignment))
        for layer, pieces in layers.items():
            if layer is not None:
                _align_layer(architecture, layer, pieces, theirs, parts, alignment)
        alignment = Alignment(architecture, parts)
    return alignment or Alignment(architecture)


def _residual(
    architecture: Architecture, layers: dict[int | None, list[Piece]], copy: Pieces, known: Alignment | None
) -> AxisMap:
    """The signed permutation of the residual stream, from all weights whose other axis is already aligned."""
    size = architecture.residual
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross, rows = torch.zeros_like(gram), 0
    for piece in (piece for pieces in layers.values() for piece in pieces):
        fixed = known is not None or set(piece.roles) == {"vocabulary", "residual"}
        scale = rms(piece.value)
        if "residual" not in piece.roles or piece.value.dim() != 2 or not fixed or not scale:
            continue
        axis = piece.roles.index("residual")
        theirs = (known or Alignment(architecture)).counterpart(copy, piece, keep=("residual",))
        x, y = (value.movedim(axis, 1) / scale for value in (piece.value, theirs))
        gram += (x.T @ x).double()
        cross += (x.T @ y).double()
        rows += len(x)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    turned, quality = vectors.T @ cross, -1.0
    index, matched = torch.arange(size), torch.eye(size, dtype=torch.float64)
    for share, damping in itertools.product(DEBIASING, DAMPING):
        t = eigenvalues - share * rows
        p = (vectors * (t / (t.square() + damping * t.square().median()))) @ turned
        candidate = assign(p.abs().T)
        found = float(p.abs().gather(0, candidate[None]).sum() / (p.norm() * size**0.5))
        if found > quality:
            index, matched, quality = candidate, p, found
        if quality > CLEAR:
            break
    if not architecture.family.signs:
        return AxisMap(index)
    # The sign of the whole is that of the directions with the largest eigenvalues, where the noise is the least.
    sign = signs(matched[index, torch.arange(size)])
    whole = float(((gram @ cross)[index, torch.arange(size)] * sign).sum())
    return AxisMap(index, sign if whole >= 0 else -sign)


def _align_layer(
    architecture: Architecture,
    layer: int,
    pieces: list[Piece],
    copy: Pieces,
    parts: Parts,
    known: Alignment | None,
) -> None:
    """Estimates all spaces of one layer, given the residual stream and perhaps an earlier estimate."""
    so_far, found = Alignment(architecture, parts), {role for piece in pieces for role in piece.roles}
    noise = _noise(pieces, copy, known)

    def rows(role: str, expert: int | None = None) -> Rows:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for piece in pieces:
            if role in piece.roles and piece.expert == expert:
                axis, theirs = piece.roles.index(role), so_far.counterpart(copy, piece, keep=(role,))
                pairs.append((flattened(piece.value, axis), flattened(theirs, axis)))
        return Rows.of(pairs, noise)

    if "experts" in found:
        router = rows("experts")
        parts.experts[layer] = AxisMap(assign(router.theirs @ router.ours.T))
        so_far = Alignment(architecture, parts)
    for expert in sorted({piece.expert for piece in pieces if "gate" in piece.roles}, key=str):
        signed = rows("ffn", expert) if "ffn" in found else None
        parts.hidden[layer, expert] = hidden(rows("gate", expert), signed)
    by_role = {role: rows(role) for role in ("query", "key", "value", "attended")}
    within, value, order = attention(architecture.heads, architecture.family.query_key == "signs", by_role)
    parts.query_key[layer], parts.value[layer], parts.heads[layer] = within, value, order


def _noise(pieces: list[Piece], copy: Pieces, known: Alignment | None) -> float:
    """The mean of Y₀² - Y₀Y₁ over the entries of a layer, with Y₁ aligned to Y₀; 0 without an earlier estimate.

    It is positive for zero-sum noise, which has one level in a layer, and about 0 if only Y₁ has noise.
    """
    if known is None:
        return 0.0
    total = count = 0.0
    for piece in pieces:
        ours = piece.value.double()
        total += float((ours * (ours - known.counterpart(copy, piece, keep=()).double())).sum())
        count += ours.numel()
    return max(0.0, total / max(1.0, count))
