"""Secret function-preserving changes of basis: drawn per space, applied to a weight, inverted on an update.

The idea: a copy's reparameterisation T is one orthogonal map per hidden space (`architecture.spaces`). A weight is changed
along each of its axes by the map of that axis; since all maps are linear and orthogonal, an update transforms as the weight
does and the inverse is the transpose, so one small `AxisMap` serves both directions. A map is rotations of consecutive
entries followed by a signed permutation: the second part moves numbers without arithmetic, so it commutes with the cast to
the storage dtype and is undone exactly.

Strengths: `none`; `paper`, what arXiv 2602.23798 (section on reparameterisation) lists: per KV group one map of queries and
keys that commutes with RoPE, a rotation of the RoPE planes of the values, and one permutation of the FFN's hidden channels
(of each expert's); `full`, every map of the table in `architecture.spaces`.

Not covered: what an attacker with a public base model, or with several copies, can undo by alignment. Permutations and
rotations hide coordinates, not functions.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from mpunlearn.architecture import Architecture, Place
from mpunlearn.architecture.spaces import Axis
from mpunlearn.server.secret import Secret, Stream

STRENGTHS = ("full", "paper", "none")


@dataclass(frozen=True, eq=False)
class AxisMap:
    """An orthogonal map of one axis: y[i] = sign[i] · (B x)[index[i]], with B block-diagonal.

    A part that is None is the identity. `rotate` is B, `arrange` the signed permutation; `apply` is both.
    """

    index: torch.Tensor | None = None
    """A permutation, shape (n,), int64."""
    sign: torch.Tensor | None = None
    """±1, shape (n,), float64."""
    blocks: torch.Tensor | None = None
    """Orthogonal matrices on consecutive entries, shape (n/d, d, d), float64."""

    @property
    def identity(self) -> bool:
        """Whether the map changes nothing."""
        return self.index is None and self.sign is None and self.blocks is None

    @cached_property
    def inverse(self) -> torch.Tensor | None:
        """The permutation's inverse, shape (n,), int64: entry i of x goes to place inverse[i] of y."""
        return None if self.index is None else torch.argsort(self.index)

    def to(self, device: torch.device) -> "AxisMap":
        """The same map of tensors on that device."""
        parts = (self.index, self.sign, self.blocks)
        return AxisMap(*(None if part is None else part.to(device) for part in parts))

    @property
    def block(self) -> int:
        """Size d of the blocks that `rotate` keeps together; 1 without rotations."""
        return 1 if self.blocks is None else self.blocks.shape[-1]

    def apply(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The map along `axis`; x is float32 or float64, and so is the result."""
        return self.arrange(self.rotate(x, axis), axis)

    def invert(self, y: torch.Tensor, axis: int) -> torch.Tensor:
        """The inverse, which is the transpose, along `axis`."""
        return self.rotate(self.rearrange(y, axis), axis, transpose=True)

    def rotate(self, x: torch.Tensor, axis: int, start: int = 0, transpose: bool = False) -> torch.Tensor:
        """B (or its transpose) along `axis` of x, whose first entry there is entry `start` (a multiple of d) of the whole."""
        if self.blocks is None:
            return x
        d = self.block
        blocks = self.blocks[start // d : start // d + x.shape[axis] // d].to(x.dtype)
        moved = x.movedim(axis, 0)
        product = torch.matmul(blocks.mT if transpose else blocks, moved.reshape(len(blocks), d, -1))
        return product.reshape(moved.shape).movedim(0, axis)

    def arrange(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The signed permutation along `axis`, in any dtype, without rounding."""
        if self.index is not None:
            x = x.index_select(axis, self.index)
        return x if self.sign is None else x * _along(self.sign, x, axis)

    def scatter(self, out: torch.Tensor, rows: torch.Tensor, start: int) -> None:
        """`arrange` along the first axis, in pieces: puts rows start … of x, in any dtype, where y has them."""
        stop = start + len(rows)
        places = slice(start, stop) if self.inverse is None else self.inverse[start:stop]
        out[places] = rows if self.sign is None else rows * _along(self.sign[places], rows, 0)

    def gather(self, y: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The inverse of `scatter`: rows start … stop of x, out of the whole of y."""
        places = slice(start, stop) if self.inverse is None else self.inverse[start:stop]
        return y[places] if self.sign is None else y[places] * _along(self.sign[places], y, 0)

    def rearrange(self, y: torch.Tensor, axis: int) -> torch.Tensor:
        """The inverse of `arrange`."""
        if self.sign is not None:
            y = y * _along(self.sign, y, axis)
        return y if self.inverse is None else y.index_select(axis, self.inverse)


IDENTITY = AxisMap()


def concatenated(maps: list[AxisMap], sizes: list[int]) -> AxisMap:
    """The map of an axis that is several axes one after another, each with its own map."""
    index = sign = blocks = None
    if any(part.index is not None for part in maps):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        index = torch.cat(
            [
                start + (torch.arange(n) if part.index is None else part.index)
                for part, n, start in zip(maps, sizes, starts, strict=True)
            ]
        )
    if any(part.sign is not None for part in maps):
        sign = torch.cat(
            [torch.ones(n).double() if part.sign is None else part.sign for part, n in zip(maps, sizes, strict=True)]
        )
    if (
        d := max(part.block for part in maps if part.blocks is not None)
        if any(p.blocks is not None for p in maps)
        else 0
    ):
        eye = torch.eye(d, dtype=torch.float64)
        blocks = torch.cat(
            [
                eye.expand(n // d, d, d) if part.blocks is None else part.blocks
                for part, n in zip(maps, sizes, strict=True)
            ]
        )
    return AxisMap(index, sign, blocks)


def interleaved(query: AxisMap, key: AxisMap, value: AxisMap, heads: int, dim: int) -> AxisMap:
    """The map of q, k and v interleaved by head (heads x 3 x dim), where every query head has a key head of its own."""
    whole = concatenated([query, key, value], [heads * dim] * 3)

    def deal(x: torch.Tensor) -> torch.Tensor:
        """From (3, heads, …) to (heads, 3, …), flattened."""
        return x.view(3, heads, *x.shape[1:]).transpose(0, 1).flatten(0, 1)

    # Where entry (part, head, i) of the concatenation lies in the interleaved axis, and the other way round.
    order = deal(torch.arange(3 * heads * dim).view(3 * heads, dim)).flatten()
    place = torch.argsort(order)
    return AxisMap(
        None if whole.index is None else place[whole.index[order]],
        None if whole.sign is None else whole.sign[order],
        None if whole.blocks is None else deal(whole.blocks),
    )


class Reparameterization:
    """The maps of one copy in one round.

    Args:
        architecture: which spaces there are.
        strength: one of `STRENGTHS`.
        secret: the run's secret.
        inputs: names what the maps hide, so that no two publications share any: the digest of a round's inputs.
        copy: copies count from 0.
        device: where the weights will lie. Maps are drawn on the processor, so they are the same for every device.
    """

    def __init__(
        self,
        architecture: Architecture,
        strength: str,
        secret: Secret,
        inputs: str | int,
        copy: int,
        device: torch.device | None = None,
    ) -> None:
        if strength not in STRENGTHS:
            raise ValueError(f"unknown strength {strength!r}, expected one of {STRENGTHS}")
        self._architecture, self._strength, self._secret = architecture, strength, secret
        self._labels = ("reparameterization", inputs, copy)
        self._device = device or torch.device("cpu")
        # A layer asks for each of its maps several times; a few layers' worth is kept.
        self._cached = lru_cache(maxsize=32)(self._draw_axis)

    def apply(self, place: Place, weight: torch.Tensor) -> torch.Tensor:
        """T on a weight, of float32 or float64, in its shape and dtype."""
        for axis, axis_map in enumerate(self.maps(place)):
            weight = axis_map.apply(weight, axis)
        return weight

    def invert(self, place: Place, update: torch.Tensor) -> torch.Tensor:
        """T⁻¹ on an update (or a weight), of float32 or float64, in its shape and dtype."""
        for axis, axis_map in enumerate(self.maps(place)):
            update = axis_map.invert(update, axis)
        return update

    def maps(self, place: Place) -> list[AxisMap]:
        """The map of each axis of a tensor."""
        return [self._cached(axis, place.layer, place.expert) for axis in place.axes]

    def published_name(self, name: str, place: Place) -> str:
        """The name under which a tensor is published: experts change places with one another, all others keep theirs."""
        if place.expert is None:
            return name
        inverse = self._cached(("experts",), place.layer, None).inverse
        number = place.expert if inverse is None else int(inverse[place.expert])
        return place.template.format(layer=place.layer, expert=number)

    def _stream(self, purpose: str, layer: int | None = None, expert: int | None = None) -> Stream:
        return self._secret.stream(*self._labels, purpose, *(-1 if n is None else n for n in (layer, expert)))

    def _draw_axis(self, axis: Axis, layer: int | None, expert: int | None) -> AxisMap:
        parts = [self._draw(role, layer, expert) for role in axis]
        if len(parts) == 1:
            return parts[0].to(self._device)
        sizes = [self._architecture.size((role,), expert is not None) for role in axis]
        return concatenated(parts, sizes).to(self._device)

    def _draw(self, role: str, layer: int | None, expert: int | None) -> AxisMap:
        """The map of a role. Residual maps are model-wide, FFN maps per layer and expert, all others per layer."""
        if self._strength == "none" or role in ("vocabulary", "head norm"):
            return IDENTITY
        if role in ("gate", "ffn"):
            return self._hidden(layer, expert, signed=role == "ffn")
        if role in ("residual", "norm"):
            return self._residual(signed=role == "residual")
        if role == "experts":
            full = self._strength == "full"
            return AxisMap(self._stream("experts", layer).permutation(self._architecture.experts)) if full else IDENTITY
        return self._attention(role, layer)

    def _residual(self, signed: bool) -> AxisMap:
        if self._strength != "full":
            return IDENTITY
        size = self._architecture.residual
        index = self._stream("residual permutation").permutation(size)
        signed = signed and self._architecture.family.signs
        return AxisMap(index, self._stream("residual signs").signs(size) if signed else None)

    def _hidden(self, layer: int | None, expert: int | None, signed: bool) -> AxisMap:
        size = self._architecture.ffn(expert is not None)
        index = self._stream("ffn permutation", layer, expert).permutation(size)
        if self._strength != "full" or not signed:
            return AxisMap(index)
        return AxisMap(index, self._stream("ffn signs", layer, expert).signs(size))

    def _attention(self, role: str, layer: int | None) -> AxisMap:
        heads = self._architecture.heads
        if role == "qkv":
            query, key, value = (self._attention(part, layer) for part in ("query", "key", "value"))
            return interleaved(query, key, value, heads.count, heads.dim)
        per_head = role in ("query", "attended", "query norm")
        within = AxisMap()
        if role in ("query", "key"):
            within = self._query_key(layer)
        elif role in ("value", "attended"):
            within = self._value(layer)
        order = self._head_order(layer, per_head)
        index = None if order is None else (order[:, None] * heads.dim + torch.arange(heads.dim)).flatten()
        blocks, sign = within.blocks, within.sign
        if per_head:
            blocks = None if blocks is None else blocks.repeat_interleave(heads.per_group, dim=0)
            sign = None if sign is None else sign.view(heads.groups, -1).repeat_interleave(heads.per_group, 0).flatten()
        if sign is not None and index is not None:
            sign = sign[index]  # signs belong to the original heads, and come after the permutation
        return AxisMap(index, sign, blocks)

    def _query_key(self, layer: int | None) -> AxisMap:
        """Per KV group a map that commutes with RoPE: rotated planes, and any orthogonal matrix beside them; or signs."""
        heads = self._architecture.heads
        half, rest = heads.rotary // 2, heads.dim - heads.rotary
        if self._architecture.family.query_key == "signs":
            planes = self._stream("query-key signs", layer).signs(heads.groups * (half + rest)).view(heads.groups, -1)
            return AxisMap(sign=torch.cat((planes[:, :half], planes), dim=1).flatten())
        angles = self._stream("query-key angles", layer).angles(heads.groups * half).view(heads.groups, half)
        blocks = torch.zeros(heads.groups, heads.dim, heads.dim, dtype=torch.float64)
        blocks[:, : heads.rotary, : heads.rotary] = plane_rotations(angles)
        if rest:
            eye = torch.eye(rest, dtype=torch.float64).expand(heads.groups, rest, rest)
            full = self._strength == "full"
            beside = self._stream("query-key beside", layer).orthogonal(heads.groups, rest) if full else eye
            blocks[:, heads.rotary :, heads.rotary :] = beside
        return AxisMap(blocks=blocks)

    def _value(self, layer: int | None) -> AxisMap:
        heads = self._architecture.heads
        if self._strength == "full":
            return AxisMap(blocks=self._stream("value", layer).orthogonal(heads.groups, heads.dim))
        if heads.dim % 2:
            return AxisMap()
        angles = self._stream("query-key angles", layer).angles(heads.groups * (heads.dim // 2))
        return AxisMap(blocks=plane_rotations(angles.view(heads.groups, -1)))

    def _head_order(self, layer: int | None, per_head: bool) -> torch.Tensor | None:
        """Which original head (or group) stands at each place."""
        if self._strength != "full":
            return None
        heads = self._architecture.heads
        groups = self._stream("groups", layer).permutation(heads.groups)
        if not per_head:
            return groups
        keys = torch.from_numpy(self._stream("heads", layer).uniforms(heads.count)).view(heads.groups, -1)
        return (groups[:, None] * heads.per_group + torch.argsort(keys, dim=1)[groups]).flatten()


def plane_rotations(angles: torch.Tensor) -> torch.Tensor:
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
            signs = size if full and "ffn" in architecture.roles else 0
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


def _along(vector: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    return vector.to(x.dtype).view([-1 if i == axis else 1 for i in range(x.dim())])
