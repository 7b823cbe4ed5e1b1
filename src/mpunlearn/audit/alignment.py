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
Matching by assignment follows Git Re-Basin (arXiv 2209.04836); rotations are orthogonal Procrustes problems (Schönemann
1966). If two copies carry noise that is zero-sum, it is anti-correlated, and the correlations of the residual stream are
E[C] = T P with the permutation P and T = G - xI, where G is the Gram matrix of the reference. The unknown x is found by
trial: the right one makes T⁻¹C look most like a signed permutation.

Not covered: scalings, which `architecture.spaces` excludes, and noise so strong that matching fails (at about 50 to 100 %
of the weights).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from mpunlearn.architecture import Architecture, Heads
from mpunlearn.audit.weights import Model, Piece, rms
from mpunlearn.server.axis_map import IDENTITY, AxisMap, plane_rotations
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
                _align_layer(architecture, layer, pieces, theirs, parts)
        alignment = Alignment(architecture, parts)
    return alignment or Alignment(architecture)


def _residual(
    architecture: Architecture, layers: dict[int | None, list[Piece]], copy: Pieces, known: Alignment | None
) -> AxisMap:
    """The signed permutation of the residual stream, from all weights whose other axis is already aligned."""
    size, signs = architecture.residual, architecture.family.signs
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
        candidate = _assign(p.abs().T)
        found = float(p.abs().gather(0, candidate[None]).sum() / (p.norm() * size**0.5))
        if found > quality:
            index, matched, quality = candidate, p, found
        if quality > CLEAR:
            break
    if not signs:
        return AxisMap(index)
    # The sign of the whole is that of the directions with the largest eigenvalues, where the noise is the least.
    sign = _signs(matched[index, torch.arange(size)])
    whole = float(((gram @ cross)[index, torch.arange(size)] * sign).sum())
    return AxisMap(index, sign if whole >= 0 else -sign)


def _align_layer(architecture: Architecture, layer: int, pieces: list[Piece], copy: Pieces, parts: Parts) -> None:
    """Estimates all spaces of one layer, given the residual stream."""
    so_far, found = Alignment(architecture, parts), {role for piece in pieces for role in piece.roles}

    def rows(*roles: str, expert: int | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """All weights along the axes with these roles, of the reference and of the copy, each of shape (n, F)."""
        ours, theirs = [], []
        for piece in pieces:
            for axis, role in enumerate(piece.roles):
                if role in roles and piece.expert == expert and (scale := rms(piece.value)):
                    value = so_far.counterpart(copy, piece, keep=roles)
                    ours.append(piece.rows(axis) / scale)
                    theirs.append(value.double().movedim(axis, 0).flatten(1 if value.dim() > 1 else 0) / scale)
                    if value.dim() == 1:
                        theirs[-1] = theirs[-1][:, None]
        return (torch.cat(ours, 1), torch.cat(theirs, 1)) if ours else None

    if "experts" in found and (router := rows("experts")) is not None:
        parts.experts[layer] = AxisMap(_assign(router[1] @ router[0].T))
        so_far = Alignment(architecture, parts)
    for expert in sorted({piece.expert for piece in pieces if {"gate", "ffn"} & set(piece.roles)}, key=str):
        plain, signed = rows("gate", expert=expert), rows("ffn", expert=expert)
        parts.hidden[layer, expert] = _hidden(plain, signed)
    names = ("query", "key", "value", "attended")
    found_rows = [rows(name) for name in names]
    if all(pair is not None for pair in found_rows):
        ours, theirs = (dict(zip(names, (pair[i] for pair in found_rows if pair), strict=True)) for i in (0, 1))
        only_signs = architecture.family.query_key == "signs"
        within, value, order = _attention(architecture.heads, only_signs, ours, theirs)
        parts.query_key[layer], parts.value[layer], parts.heads[layer] = within, value, order


def _hidden(
    plain: tuple[torch.Tensor, torch.Tensor] | None, signed: tuple[torch.Tensor, torch.Tensor] | None
) -> AxisMap:
    """The signed permutation of hidden channels, from weights that follow only the permutation and from the others.

    Args:
        plain: rows of the reference and of the copy that ignore the signs (`gate`).
        signed: rows that follow them (`ffn`).
    """
    unsigned = plain[1] @ plain[0].T if plain is not None else torch.zeros(())
    overlap = signed[1] @ signed[0].T if signed is not None else torch.zeros(())
    candidates = []
    for sign in (1.0, -1.0):  # strong zero-sum noise turns the correlation around
        score = sign * unsigned + overlap.abs()
        index = _assign(score)
        total = float(score.gather(1, index[:, None]).sum())
        candidates.append((total, index))
        if total > 0.5 * float(score.abs().amax(1).sum()):
            break
    index = max(candidates, key=lambda candidate: candidate[0])[1]
    if signed is None:
        return AxisMap(index)
    return AxisMap(index, _signs(overlap.gather(1, index[:, None]).flatten()))


def _attention(
    heads: Heads, only_signs: bool, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> tuple[AxisMap, AxisMap, HeadOrder]:
    """The maps of queries and keys, the maps of values, and the order of heads in one layer.

    Args:
        heads: number and sizes of the heads.
        only_signs: whether queries and keys allow only sign flips.
        ours: rows of the reference for each role, shape (heads or groups x dim, F).
        theirs: the same for the copy.
    """
    ours, theirs = ({role: rows.unflatten(0, (-1, heads.dim)) for role, rows in side.items()} for side in (ours, theirs))
    of_keys = _Overlap.of(ours["key"], theirs["key"], heads.rotary)
    values = torch.einsum("gaf,hbf->ghab", ours["value"], theirs["value"])
    groups = _assign((of_keys.strength(only_signs) + torch.linalg.matrix_norm(values, ord="nuc")).T)
    order = torch.zeros(heads.count, dtype=torch.int64)
    within, of_value = [torch.empty(0)] * heads.groups, [torch.empty(0)] * heads.groups
    for there, here in enumerate(groups.tolist()):
        mine = slice(here * heads.per_group, (here + 1) * heads.per_group)
        its = slice(there * heads.per_group, (there + 1) * heads.per_group)
        keys, value = of_keys.pair(here, there), values[here, there]
        queries = _Overlap.of(ours["query"][mine], theirs["query"][its], heads.rotary)
        outputs = torch.einsum("gaf,hbf->ghab", ours["attended"][mine], theirs["attended"][its])
        by_output = (outputs * _rotation(value).T).sum(dim=(2, 3)).abs()
        matched = _assign((queries.under(keys.map(only_signs), heads.rotary) + by_output).T)
        order[its] = here * heads.per_group + matched
        for position, head in enumerate(matched.tolist()):
            keys, value = keys + queries.pair(head, position), value + outputs[head, position]
        within[here], of_value[here] = keys.map(only_signs), _rotation(value)
    blocks = torch.stack(within)
    query_key = AxisMap(sign=blocks.diagonal(dim1=1, dim2=2).flatten()) if only_signs else AxisMap(blocks=blocks)
    return query_key, AxisMap(blocks=torch.stack(of_value)), HeadOrder(groups, order)


@dataclass(frozen=True, eq=False)
class _Overlap:
    """Inner products between the queries or keys of two models, for every pair of heads or for one of them."""

    planes: torch.Tensor
    """Σ z z̃* for each RoPE plane, whose two rows are the real and imaginary part of z; shape (…, planes), complex."""
    rest: torch.Tensor
    """Inner products of the rows that RoPE leaves alone, shape (…, rest, rest), float64."""

    @classmethod
    def of(cls, ours: torch.Tensor, theirs: torch.Tensor, rotary: int) -> "_Overlap":
        """For every pair of heads; `ours` and `theirs` have the shape (heads, dim, F)."""
        half = rotary // 2
        z, other = (torch.complex(rows[:, :half], rows[:, half:rotary]) for rows in (ours, theirs))
        planes = torch.einsum("gpf,hpf->ghp", z, other.conj())
        return cls(planes, torch.einsum("gaf,hbf->ghab", ours[:, rotary:], theirs[:, rotary:]))

    def pair(self, ours: int, theirs: int) -> "_Overlap":
        """For one pair of heads."""
        return _Overlap(self.planes[ours, theirs], self.rest[ours, theirs])

    def __add__(self, other: "_Overlap") -> "_Overlap":
        return _Overlap(self.planes + other.planes, self.rest + other.rest)

    def strength(self, only_signs: bool) -> torch.Tensor:
        """The overlap under the best map, shape (heads, heads)."""
        if only_signs:
            return self.planes.real.abs().sum(-1) + self.rest.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
        return self.planes.abs().sum(-1) + torch.linalg.matrix_norm(self.rest, ord="nuc")

    def map(self, only_signs: bool) -> torch.Tensor:
        """The best map from our rows to theirs, for one pair of heads, shape (dim, dim)."""
        if only_signs:
            planes = _signs(self.planes.real)
            return torch.diag(torch.cat((planes, planes, _signs(self.rest.diagonal()))))
        return torch.block_diag(plane_rotations(-self.planes.angle()[None])[0], _rotation(self.rest))

    def under(self, block: torch.Tensor, rotary: int) -> torch.Tensor:
        """The overlap under a given map of shape (dim, dim), for every pair of heads."""
        half = rotary // 2
        cosine, sine = block.diagonal()[:half], block[half:rotary, :half].diagonal()
        planes = (self.planes * torch.complex(cosine, sine)).real.sum(-1)
        return planes + (self.rest * block[rotary:, rotary:].T).sum(dim=(2, 3))


def _rotation(overlap: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix R that maximizes tr(R M), where M = X Yᵀ for rows X and Y ≈ R X."""
    u, _, wt = torch.linalg.svd(overlap)
    return wt.mT @ u.mT


def _assign(score: torch.Tensor) -> torch.Tensor:
    """The column for each row of a square matrix that maximizes the sum; a permutation, shape (n,), int64."""
    greedy = score.argmax(dim=1)
    if len(greedy.unique()) == len(greedy):
        return greedy  # the best entry of every row is an upper bound
    return torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])


def _signs(values: torch.Tensor) -> torch.Tensor:
    """±1 for each value, float64; +1 for zero."""
    return torch.where(values < 0, -1.0, 1.0).double()
