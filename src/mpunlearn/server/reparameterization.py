"""Secret function-preserving changes of basis: drawn per space, applied to a weight, inverted on an update.

The idea: a copy's reparameterisation T is one orthogonal map per hidden space (`architecture.spaces`). A weight is changed
along each of its axes by the map of that axis's role; since all maps are linear and orthogonal, an update transforms as the
weight does and the inverse is the transpose, so one small `AxisMap` serves both directions.

Strengths: `none`; `paper`, what arXiv 2602.23798 (section on reparameterisation) lists: per KV group one rotation of the
RoPE planes shared by q, k and v, and one permutation of the FFN's hidden channels; `full`, every map of the table in
`architecture.spaces`.

Not covered: what an attacker with a public base model, or with several copies, can undo by alignment. Permutations and
rotations hide coordinates, not functions.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from mpunlearn.architecture import Architecture, Place
from mpunlearn.server.secret import Secret, Stream

STRENGTHS = ("full", "paper", "none")


@dataclass(frozen=True)
class AxisMap:
    """An orthogonal map of one axis: y[i] = sign[i] · (B x)[index[i]], with B block-diagonal. A part that is None is the
    identity.
    """

    index: torch.Tensor | None = None
    """A permutation, shape (n,), int64."""
    sign: torch.Tensor | None = None
    """±1, shape (n,), float64."""
    blocks: torch.Tensor | None = None
    """Orthogonal matrices on consecutive entries, shape (n/d, d, d), float64."""

    def apply(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The map along `axis` of a tensor of float32 or float64, in its dtype."""
        if self.blocks is not None:
            x = _multiply(self.blocks, x, axis)
        if self.index is not None:
            x = x.index_select(axis, self.index)
        if self.sign is not None:
            x = x * _along(self.sign, x, axis)
        return x

    def invert(self, y: torch.Tensor, axis: int) -> torch.Tensor:
        """The inverse, which is the transpose, along `axis`."""
        if self.sign is not None:
            y = y * _along(self.sign, y, axis)
        if self.index is not None:
            y = y.index_select(axis, torch.argsort(self.index))
        if self.blocks is not None:
            y = _multiply(self.blocks.transpose(-1, -2), y, axis)
        return y


IDENTITY = AxisMap()


class Reparameterization:
    """The maps of one copy in one round.

    Args:
        architecture: which spaces there are.
        strength: one of `STRENGTHS`.
        secret: the run's secret.
        round_number: rounds count from 1.
        copy: copies count from 0.
    """

    def __init__(self, architecture: Architecture, strength: str, secret: Secret, round_number: int, copy: int) -> None:
        if strength not in STRENGTHS:
            raise ValueError(f"unknown strength {strength!r}, expected one of {STRENGTHS}")
        self._architecture, self._strength, self._secret = architecture, strength, secret
        self._labels = ("reparameterization", round_number, copy)
        self._map = lru_cache(maxsize=16)(self._draw)

    def apply(self, place: Place, weight: torch.Tensor) -> torch.Tensor:
        """T on a weight, of float32 or float64, in its shape and dtype."""
        for axis, role in enumerate(place.roles):
            weight = self._map(role, place.layer).apply(weight, axis)
        return weight

    def invert(self, place: Place, update: torch.Tensor) -> torch.Tensor:
        """T⁻¹ on an update (or a weight), of float32 or float64, in its shape and dtype."""
        for axis, role in enumerate(place.roles):
            update = self._map(role, place.layer).invert(update, axis)
        return update

    def _stream(self, purpose: str, layer: int | None) -> Stream:
        return self._secret.stream(*self._labels, purpose, -1 if layer is None else layer)

    def _draw(self, role: str, layer: int | None) -> AxisMap:
        """The map of a role. Residual maps are model-wide, whatever layer asks for them; all others are per layer."""
        if self._strength == "none" or role == "vocabulary":
            return IDENTITY
        if role in ("residual", "norm"):
            return self._residual(signed=role == "residual")
        if role in ("gate", "ffn"):
            return self._hidden(layer, signed=role == "ffn")
        return self._attention(role, layer)

    def _residual(self, signed: bool) -> AxisMap:
        if self._strength != "full":
            return IDENTITY
        size = self._architecture.residual
        index = self._stream("residual permutation", None).permutation(size)
        return AxisMap(index, self._stream("residual signs", None).signs(size) if signed else None)

    def _hidden(self, layer: int | None, signed: bool) -> AxisMap:
        size = self._architecture.ffn
        index = self._stream("ffn permutation", layer).permutation(size)
        if self._strength != "full" or not signed:
            return AxisMap(index)
        return AxisMap(index, self._stream("ffn signs", layer).signs(size))

    def _attention(self, role: str, layer: int | None) -> AxisMap:
        heads = self._architecture.heads
        planes = self._stream("query-key angles", layer).angles(heads.groups * (heads.dim // 2))
        blocks = rope_rotations(planes.view(heads.groups, heads.dim // 2))
        if self._strength == "full" and role in ("value", "attended"):
            blocks = self._stream("value", layer).orthogonal(heads.groups, heads.dim)
        per_head = role in ("query", "attended")
        if per_head:
            blocks = blocks.repeat_interleave(heads.per_group, dim=0)
        if self._strength == "paper":
            return AxisMap(blocks=blocks)
        order = self._stream("groups", layer).permutation(heads.groups)
        if per_head:
            within = torch.argsort(
                torch.from_numpy(self._stream("heads", layer).uniforms(heads.count)).view(heads.groups, -1), dim=1
            )
            order = (order[:, None] * heads.per_group + within[order]).flatten()
        entries = torch.arange(heads.dim)
        return AxisMap((order[:, None] * heads.dim + entries).flatten(), blocks=blocks)


def rope_rotations(angles: torch.Tensor) -> torch.Tensor:
    """Rotations that commute with RoPE: by angle i in the plane of entries (i, i + d/2).

    Args:
        angles: shape (n, d/2), radians.

    Returns:
        Shape (n, d, d), in the dtype of the angles.
    """
    n, half = angles.shape
    first = torch.arange(half)
    second = first + half
    blocks = torch.zeros(n, 2 * half, 2 * half, dtype=angles.dtype)
    blocks[:, first, first] = blocks[:, second, second] = torch.cos(angles)
    blocks[:, second, first] = torch.sin(angles)
    blocks[:, first, second] = -torch.sin(angles)
    return blocks


def _along(vector: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    return vector.to(x.dtype).view([-1 if i == axis else 1 for i in range(x.dim())])


def _multiply(blocks: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """Multiplies consecutive runs of d entries along `axis` by the blocks, shape (n, d, d)."""
    n, d, _ = blocks.shape
    moved = x.movedim(axis, 0)
    product = torch.matmul(blocks.to(x.dtype), moved.reshape(n, d, -1))
    return product.reshape(moved.shape).movedim(0, axis)
