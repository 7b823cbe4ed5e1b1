"""Estimates the map of one hidden space from corresponding weights of two models.

The idea: an orthogonal map leaves inner products unchanged, so the rows of two models that belong together still
correlate. Permutations of channels, heads and groups are found as the assignment with the largest sum of correlations
(as in Git Re-Basin, arXiv 2209.04836); rotations as orthogonal Procrustes problems (Schönemann 1966). A rotation that
commutes with RoPE is one complex number for each plane, so its angle is that of a complex inner product.

Not covered: which rows correspond (`alignment` knows that).
"""

from dataclasses import dataclass, replace

import torch

from mpunlearn.architecture import Heads
from mpunlearn.audit.weights import rms
from mpunlearn.server.axis_map import AxisMap, plane_rotations
from mpunlearn.server.role_maps import HeadOrder


@dataclass(frozen=True, eq=False)
class Rows:
    """Corresponding rows of the reference and the copy: all weights of a layer along the axes with some role."""

    ours: torch.Tensor
    """Shape (n, F), float64."""
    theirs: torch.Tensor
    excess: float
    """How much smaller the product of corresponding rows is expected to be than the square of ours, due to noise."""

    @classmethod
    def of(cls, pairs: list[tuple[torch.Tensor, torch.Tensor]], noise: float) -> "Rows":
        """Joins the rows of several weights, given as pairs of shape (n, F_i); each counts with 1/RMS²."""
        scales = [rms(ours) for ours, _ in pairs]
        kept = [(ours / scale, theirs / scale) for (ours, theirs), scale in zip(pairs, scales, strict=True) if scale]
        excess = sum(ours.shape[1] * noise / scale**2 for (ours, _), scale in zip(pairs, scales, strict=True) if scale)
        return cls(torch.cat([ours for ours, _ in kept], 1), torch.cat([theirs for _, theirs in kept], 1), excess)

    @property
    def squares(self) -> torch.Tensor:
        """The expected product of each row of ours with the row of theirs that corresponds to it, shape (n,)."""
        return self.ours.square().sum(1) - self.excess


def hidden(plain: Rows, signed: Rows | None) -> AxisMap:
    """The signed permutation of hidden channels.

    Args:
        plain: rows that follow only the permutation (`gate`).
        signed: rows that follow the signs, too (`ffn`).
    """
    score = (plain.theirs @ plain.ours.T) * signs(plain.squares)
    if signed is None:
        return AxisMap(assign(score))
    overlap = (signed.theirs @ signed.ours.T) * signs(signed.squares)
    index = assign(score + overlap.abs())
    return AxisMap(index, signs(overlap.gather(1, index[:, None]).flatten()))


def attention(heads: Heads, only_signs: bool, rows: dict[str, Rows]) -> tuple[AxisMap, AxisMap, HeadOrder]:
    """The maps of queries and keys, the maps of values, and the order of heads in one layer.

    Args:
        heads: number and sizes of the heads.
        only_signs: whether queries and keys allow only sign flips.
        rows: by role (query, key, value, attended); n is the number of heads or groups times `heads.dim`.
    """
    keys, queries = _Overlap.of(rows["key"], heads), _Overlap.of(rows["query"], heads)
    values, outputs = (_Overlap.of(rows[role], replace(heads, rotary=0)) for role in ("value", "attended"))
    groups = assign((keys.strength(only_signs) + values.strength(only_signs=False)).T)
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
        matched = assign(torch.tensor(score, dtype=torch.float64))
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
    def of(cls, rows: Rows, heads: Heads) -> "_Overlap":
        """For every pair of heads."""
        ours, theirs = (side.reshape(-1, heads.dim, side.shape[1]) for side in (rows.ours, rows.theirs))
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
            return torch.add(self.planes.real.abs().sum(-1), self.rest.diagonal(dim1=-2, dim2=-1).abs().sum(-1))
        return torch.add(self.planes.abs().sum(-1), torch.linalg.matrix_norm(self.rest, ord="nuc"))

    def map(self, only_signs: bool) -> torch.Tensor:
        """The best map from our rows to theirs, for one pair of heads, shape (dim, dim).

        Where the noise is stronger than the rows, zero-sum noise turns the products around; the Gram matrix tells where.
        """
        planes = self.planes * signs(self.planes_gram)
        if only_signs:
            turned = signs(planes.real)
            return torch.diag(torch.cat((turned, turned, signs(self.rest.diagonal() * self.rest_gram.diagonal()))))
        eigenvalues, vectors = torch.linalg.eigh(self.rest_gram)
        u, _, wt = torch.linalg.svd((vectors * signs(eigenvalues)) @ (vectors.T @ self.rest))
        rotary = 2 * len(planes)
        block = torch.zeros(rotary + len(u), rotary + len(u), dtype=torch.float64)
        block[:rotary, :rotary] = plane_rotations(-planes.angle()[None])[0]
        block[rotary:, rotary:] = wt.T @ u.T
        return block

    def under(self, block: torch.Tensor) -> torch.Tensor:
        """The overlap under a given map of shape (dim, dim), for one pair of heads."""
        half = len(self.planes)
        rotation = torch.complex(block.diagonal()[:half], block[half : 2 * half, :half].diagonal())
        planes = (self.planes * rotation).real * signs(self.planes_gram)
        return planes.sum() + (self.rest * block[2 * half :, 2 * half :].T).sum()


def flattened(value: torch.Tensor, axis: int) -> torch.Tensor:
    """A tensor with this axis first and all others flattened, shape (n, F), float64."""
    return value.double().movedim(axis, 0).reshape(value.shape[axis], -1)


def assign(score: torch.Tensor) -> torch.Tensor:
    """The column for each row of a square matrix that maximizes the sum; a permutation, shape (n,), int64."""
    greedy = score.argmax(dim=1)
    if len(set(greedy.tolist())) == len(greedy):
        return greedy  # the best entry of every row is an upper bound
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])


def signs(values: torch.Tensor) -> torch.Tensor:
    """±1 for each value, float64; +1 for zero."""
    return torch.where(values < 0, -1.0, 1.0).double()
