"""Secret, function-preserving reparameterizations of the model, one per published copy.

A reparameterization T changes the weights but not the function that the network computes, for example by permuting the
hidden channels of an FFN consistently in all weights that share them. The server publishes each copy under its own
secret T and applies the inverse to the client's update.

The idea: T consists of one orthogonal map per hidden space (see `architecture.spaces`). A weight is transformed along
each of its axes by the map of that axis's space. The maps are linear, so an update transforms like its weight; they are
orthogonal, so the inverse is the transpose. A single `AxisMap` therefore serves both directions.

Strengths: `none`; `paper` uses the maps listed in arXiv 2602.23798 (section on reparameterization): for each KV group,
one map of queries and keys that commutes with RoPE and a rotation of the RoPE planes of the values, and a permutation
of the hidden channels of each FFN (or expert); `full` uses all maps in the table of `architecture.spaces`.

Not covered: attackers who undo the maps by aligning a copy with a public base model or with other copies. Permutations
and rotations hide the coordinates of the weights, not the function of the network.
"""

from functools import lru_cache

import torch

from mpunlearn.architecture import Architecture, TensorRole
from mpunlearn.architecture.spaces import Axis
from mpunlearn.server.axis_map import IDENTITY, AxisMap, concatenated, interleaved, plane_rotations
from mpunlearn.server.perturbation import Strength
from mpunlearn.server.secret import Secret, Stream


class Reparameterization:
    """The reparameterization T of one copy in one round.

    Args:
        architecture: the model's architecture, which determines the hidden spaces.
        strength: full, paper or none.
        secret: the run's secret.
        inputs: digest of everything that the round hides, so that no two publications share a map.
        copy: index of the copy, starting at 0.
        device: device of the weights. Maps are drawn on the CPU, so they do not depend on the device.
    """

    def __init__(
        self,
        architecture: Architecture,
        strength: Strength,
        secret: Secret,
        inputs: str | int,
        copy: int,
        device: torch.device | None = None,
    ) -> None:
        self._architecture, self._strength, self._secret = architecture, strength, secret
        self._labels = ("reparameterization", inputs, copy)
        self._device = device or torch.device("cpu")
        # Several weights of a layer share each map; the maps of a few layers are cached.
        self._cached = lru_cache(maxsize=32)(self._draw_axis)

    def apply(self, role: TensorRole, weight: torch.Tensor) -> torch.Tensor:
        """Applies T to a weight (float32 or float64); the result has the same shape and dtype."""
        for axis, axis_map in enumerate(self.maps(role)):
            weight = axis_map.apply(weight, axis)
        return weight

    def invert(self, role: TensorRole, update: torch.Tensor) -> torch.Tensor:
        """Applies T⁻¹ to an update or a weight (float32 or float64); the result has the same shape and dtype."""
        for axis, axis_map in enumerate(self.maps(role)):
            update = axis_map.invert(update, axis)
        return update

    def maps(self, role: TensorRole) -> list[AxisMap]:
        """The maps of a tensor, one per axis."""
        return [self._cached(axis, role.layer, role.expert) for axis in role.axes]

    def published_name(self, name: str, role: TensorRole) -> str:
        """The name of a tensor in the copy. Experts are permuted and thus renumbered; other names do not change."""
        if role.expert is None:
            return name
        inverse = self._cached(("experts",), role.layer, None).inverse
        number = role.expert if inverse is None else int(inverse[role.expert])
        return role.template.format(layer=role.layer, expert=number)

    def _stream(self, purpose: str, layer: int | None = None, expert: int | None = None) -> Stream:
        return self._secret.stream(*self._labels, purpose, *(-1 if n is None else n for n in (layer, expert)))

    def _draw_axis(self, axis: Axis, layer: int | None, expert: int | None) -> AxisMap:
        parts = [self._draw(role, layer, expert) for role in axis]
        if len(parts) == 1:
            return parts[0].to(self._device)
        sizes = [self._architecture.size((role,), expert is not None) for role in axis]
        return concatenated(parts, sizes).to(self._device)

    def _draw(self, role: str, layer: int | None, expert: int | None) -> AxisMap:
        """The map of an axis role; shared by the whole model (residual), by a layer and expert (FFN), or by a layer."""
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
            sign = sign[index]  # signs are drawn per original head, but applied after the permutation
        return AxisMap(index, sign, blocks)

    def _query_key(self, layer: int | None) -> AxisMap:
        """A map per KV group that commutes with RoPE: plane rotations, orthogonal on the other entries; or signs."""
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
            on_rest = self._stream("query-key beside", layer).orthogonal(heads.groups, rest) if full else eye
            blocks[:, heads.rotary :, heads.rotary :] = on_rest
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
        """The original head (or KV group) at each position; None if the heads are not permuted."""
        if self._strength != "full":
            return None
        heads = self._architecture.heads
        groups = self._stream("groups", layer).permutation(heads.groups)
        if not per_head:
            return groups
        keys = torch.from_numpy(self._stream("heads", layer).uniforms(heads.count)).view(heads.groups, -1)
        return (groups[:, None] * heads.per_group + torch.argsort(keys, dim=1)[groups]).flatten()
