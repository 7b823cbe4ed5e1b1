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

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.server.axis_map import IDENTITY, AxisMap, plane_rotations
from mpunlearn.server.perturbation import Strength
from mpunlearn.server.role_maps import HeadOrder, RoleMaps
from mpunlearn.server.secret import Stream, Streams


class Reparameterization(RoleMaps):
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
        secret: Streams,
        inputs: str | int,
        copy: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(architecture, device)
        self._strength, self._secret = strength, secret
        self._labels = ("reparameterization", inputs, copy)

    def _stream(self, purpose: str, layer: int | None = None, expert: int | None = None) -> Stream:
        return self._secret.stream(*self._labels, purpose, *(-1 if n is None else n for n in (layer, expert)))

    def _residual(self) -> AxisMap:
        if self._strength != "full":
            return IDENTITY
        size = self._architecture.residual
        index = self._stream("residual permutation").permutation(size)
        signed = self._architecture.family.signs
        return AxisMap(index, self._stream("residual signs").signs(size) if signed else None)

    def _hidden(self, layer: int | None, expert: int | None) -> AxisMap:
        if self._strength == "none":
            return IDENTITY
        size = self._architecture.ffn(expert is not None)
        index = self._stream("ffn permutation", layer, expert).permutation(size)
        if self._strength != "full":
            return AxisMap(index)
        return AxisMap(index, self._stream("ffn signs", layer, expert).signs(size))

    def _query_key(self, layer: int | None) -> AxisMap:
        """A map per KV group that commutes with RoPE: plane rotations, orthogonal on the other entries; or signs."""
        if self._strength == "none":
            return IDENTITY
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
        if self._strength == "none" or heads.dim % 2:
            return IDENTITY
        angles = self._stream("query-key angles", layer).angles(heads.groups * (heads.dim // 2))
        return AxisMap(blocks=plane_rotations(angles.view(heads.groups, -1)))

    def _head_order(self, layer: int | None) -> HeadOrder | None:
        if self._strength != "full":
            return None
        heads = self._architecture.heads
        groups = self._stream("groups", layer).permutation(heads.groups)
        keys = torch.from_numpy(self._stream("heads", layer).uniforms(heads.count)).view(heads.groups, -1)
        return HeadOrder(groups, (groups[:, None] * heads.per_group + torch.argsort(keys, dim=1)[groups]).flatten())

    def _experts(self, layer: int | None) -> AxisMap:
        if self._strength != "full":
            return IDENTITY
        return AxisMap(self._stream("experts", layer).permutation(self._architecture.experts))
