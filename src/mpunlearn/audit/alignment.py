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
from dataclasses import dataclass, field, replace

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
                _align_layer(architecture, layer, pieces, theirs, parts, alignment)
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


@dataclass(frozen=True, eq=False)
class _Rows:
    """Corresponding rows of the reference and the copy: all weights of a layer along the axes with some role."""

    ours: torch.Tensor
    """Shape (n, F), float64."""
    theirs: torch.Tensor
    excess: float
    """How much smaller the product of corresponding rows is expected to be than the square of ours, due to noise."""

    @classmethod
    def of(cls, pairs: list[tuple[torch.Tensor, torch.Tensor]], noise: float) -> "_Rows":
        """Joins the rows of several weights, given as pairs of shape (n, F_i); each counts with 1/RMS²."""
        scales = [rms(ours) for ours, _ in pairs]
        kept = [(ours / scale, theirs / scale) for (ours, theirs), scale in zip(pairs, scales, strict=True) if scale]
        excess = sum(ours.shape[1] * noise / scale**2 for (ours, _), scale in zip(pairs, scales, strict=True) if scale)
        return cls(torch.cat([ours for ours, _ in kept], 1), torch.cat([theirs for _, theirs in kept], 1), excess)

    @property
    def squares(self) -> torch.Tensor:
        """The expected product of each row of ours with the row of theirs that corresponds to it, shape (n,)."""
        return self.ours.square().sum(1) - self.excess


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
    noise = _noise(pieces, copy, known, so_far)

    def rows(role: str, expert: int | None = None) -> _Rows:
        pairs = []
        for piece in pieces:
            if role in piece.roles and piece.expert == expert:
                theirs = so_far.counterpart(copy, piece, keep=(role,))
                pairs.append(tuple(_first(value, piece.roles.index(role)) for value in (piece.value, theirs)))
        return _Rows.of(pairs, noise)

    if "experts" in found:
        router = rows("experts")
        parts.experts[layer] = AxisMap(_assign(router.theirs @ router.ours.T))
        so_far = Alignment(architecture, parts)
    for expert in sorted({piece.expert for piece in pieces if "gate" in piece.roles}, key=str):
        signed = rows("ffn", expert) if "ffn" in found else None
        parts.hidden[layer, expert] = _hidden(rows("gate", expert), signed)
    by_role = {role: rows(role) for role in ("query", "key", "value", "attended")}
    within, value, order = _attention(architecture.heads, architecture.family.query_key == "signs", by_role)
    parts.query_key[layer], parts.value[layer], parts.heads[layer] = within, value, order


def _noise(pieces: list[Piece], copy: Pieces, known: Alignment | None, so_far: Alignment) -> float:
    """The mean of Y₀² - Y₀Y₁ over the entries of a layer, whose noise has one level; Y₁ is aligned to Y₀.

    Without an earlier estimate, only the norm weights are aligned. Their entries are few and large, so that half of the
    mean of (Y₀ - Y₁)² is the better estimate, for noise of the same level in both.
    """
    total = count = 0.0
    for piece in pieces:
        if known is not None or piece.roles == ("norm",):
            theirs = (known or so_far).counterpart(copy, piece, keep=())
            ours, apart = piece.value.double(), piece.value.double() - theirs.double()
            total += float((ours * apart).sum() if known is not None else apart.square().sum() / 2)
            count += ours.numel()
    return max(0.0, total / max(1.0, count))


def _hidden(plain: _Rows, signed: _Rows | None) -> AxisMap:
    """The signed permutation of hidden channels.

    Args:
        plain: rows that follow only the permutation (`gate`).
        signed: rows that follow the signs, too (`ffn`).
    """
    score = (plain.theirs @ plain.ours.T) * _signs(plain.squares)
    if signed is None:
        return AxisMap(_assign(score))
    overlap = (signed.theirs @ signed.ours.T) * _signs(signed.squares)
    index = _assign(score + overlap.abs())
    return AxisMap(index, _signs(overlap.gather(1, index[:, None]).flatten()))


def _attention(heads: Heads, only_signs: bool, rows: dict[str, _Rows]) -> tuple[AxisMap, AxisMap, HeadOrder]:
    """The maps of queries and keys, the maps of values, and the order of heads in one layer.

    Args:
        heads: number and sizes of the heads.
        only_signs: whether queries and keys allow only sign flips.
        rows: by role (query, key, value, attended); n is the number of heads or groups times `heads.dim`.
    """
    keys, queries = _Overlap.of(rows["key"], heads), _Overlap.of(rows["query"], heads)
    values, outputs = (_Overlap.of(rows[role], replace(heads, rotary=0)) for role in ("value", "attended"))
    groups = _assign((keys.strength(only_signs) + values.strength(only_signs=False)).T)
    order = torch.zeros(heads.count, dtype=torch.int64)
    within, of_value = [torch.empty(0)] * heads.groups, [torch.empty(0)] * heads.groups
    for there, here in enumerate(groups.tolist()):
        ours, theirs = (range(i * heads.per_group, (i + 1) * heads.per_group) for i in (here, there))
        key, value = keys.pair(here, there), values.pair(here, there)
        pairs = [[(queries.pair(a, b), outputs.pair(a, b)) for a in ours] for b in theirs]
        score = [
            [float(query.under(key.map(only_signs)) + output.under(value.map(False)).abs()) for query, output in row]
            for row in pairs
        ]
        matched = _assign(torch.tensor(score, dtype=torch.float64))
        order[list(theirs)] = ours.start + matched
        for row, head in zip(pairs, matched.tolist(), strict=True):
            key, value = key + row[head][0], value + row[head][1]
        within[here], of_value[here] = key.map(only_signs), value.map(False)
    blocks = torch.stack(within)
    query_key = AxisMap(sign=blocks.diagonal(dim1=1, dim2=2).flatten()) if only_signs else AxisMap(blocks=blocks)
    return query_key, AxisMap(blocks=torch.stack(of_value)), HeadOrder(groups, order)


@dataclass(frozen=True, eq=False)
class _Overlap:
    """Inner products between the rows of two models' heads, for every pair of heads or for one of them.

    The rows of a RoPE plane are the real and imaginary part of complex numbers z.
    """

    planes: torch.Tensor
    """Σ z₀ z₁* for each plane, shape (…, planes), complex."""
    rest: torch.Tensor
    """Products of the rows that RoPE leaves alone, shape (…, rest, rest), float64."""
    planes_gram: torch.Tensor
    """Σ |z₀|² less the noise: what `planes` would be if the maps were the identity. One per head of ours."""
    rest_gram: torch.Tensor
    """The same for `rest`."""

    @classmethod
    def of(cls, rows: _Rows, heads: Heads) -> "_Overlap":
        """For every pair of heads."""
        ours, theirs = (side.unflatten(0, (-1, heads.dim)) for side in (rows.ours, rows.theirs))
        half, rotary = heads.rotary // 2, heads.rotary
        z, other = (torch.complex(side[:, :half], side[:, half:rotary]) for side in (ours, theirs))
        left, beside = ours[:, rotary:], theirs[:, rotary:]
        return cls(
            torch.einsum("gpf,hpf->ghp", z, other.conj()),
            torch.einsum("gaf,hbf->ghab", left, beside),
            z.abs().square().sum(-1) - 2 * rows.excess,
            left @ left.mT - rows.excess * torch.eye(heads.dim - rotary, dtype=torch.float64),
        )

    def pair(self, ours: int, theirs: int) -> "_Overlap":
        """For one pair of heads."""
        return _Overlap(
            self.planes[ours, theirs], self.rest[ours, theirs], self.planes_gram[ours], self.rest_gram[ours]
        )

    def __add__(self, other: "_Overlap") -> "_Overlap":
        return _Overlap(
            self.planes + other.planes,
            self.rest + other.rest,
            self.planes_gram + other.planes_gram,
            self.rest_gram + other.rest_gram,
        )

    def strength(self, only_signs: bool) -> torch.Tensor:
        """The overlap under the best map, shape (heads, heads)."""
        if only_signs:
            return self.planes.real.abs().sum(-1) + self.rest.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
        return self.planes.abs().sum(-1) + torch.linalg.matrix_norm(self.rest, ord="nuc")

    def map(self, only_signs: bool) -> torch.Tensor:
        """The best map from our rows to theirs, for one pair of heads, shape (dim, dim).

        Where the noise is stronger than the rows, zero-sum noise turns the products around; the Gram matrix tells where.
        """
        planes = self.planes * _signs(self.planes_gram)
        if only_signs:
            turned = _signs(planes.real)
            return torch.diag(torch.cat((turned, turned, _signs(self.rest.diagonal() * self.rest_gram.diagonal()))))
        eigenvalues, vectors = torch.linalg.eigh(self.rest_gram)
        u, _, wt = torch.linalg.svd((vectors * _signs(eigenvalues)) @ (vectors.T @ self.rest))
        return torch.block_diag(plane_rotations(-planes.angle()[None])[0], wt.T @ u.T)

    def under(self, block: torch.Tensor) -> torch.Tensor:
        """The overlap under a given map of shape (dim, dim), for one pair of heads."""
        half = len(self.planes)
        rotation = torch.complex(block.diagonal()[:half], block[half : 2 * half, :half].diagonal())
        planes = (self.planes * rotation).real * _signs(self.planes_gram)
        return planes.sum() + (self.rest * block[2 * half :, 2 * half :].T).sum()


def _first(value: torch.Tensor, axis: int) -> torch.Tensor:
    """A tensor with this axis first and all others flattened, shape (n, F), float64."""
    return value.double().movedim(axis, 0).reshape(value.shape[axis], -1)


def _assign(score: torch.Tensor) -> torch.Tensor:
    """The column for each row of a square matrix that maximizes the sum; a permutation, shape (n,), int64."""
    greedy = score.argmax(dim=1)
    if len(greedy.unique()) == len(greedy):
        return greedy  # the best entry of every row is an upper bound
    return torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])


def _signs(values: torch.Tensor) -> torch.Tensor:
    """±1 for each value, float64; +1 for zero."""
    return torch.where(values < 0, -1.0, 1.0).double()
