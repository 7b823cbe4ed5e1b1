"""The maps of every axis of every weight, put together from one map per hidden space.

The idea: a function-preserving map of a model consists of a few independent parts: one signed permutation of the
residual stream, one of each FFN's hidden channels, the maps of queries and keys, of values, and the orders of heads and
experts (see `architecture.spaces`). A weight is transformed along each of its axes by the map of the axis's role, which
`RoleMaps` builds from these parts. `Reparameterization` draws the parts from the server's secret; the audit estimates
them from published copies. Both therefore have exactly the same freedom, for every model family.

Not covered: what the parts may be. A subclass that returns a map that the family does not allow changes the function.
"""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import NamedTuple

import torch

from mpunlearn.architecture import Architecture, TensorRole
from mpunlearn.architecture.spaces import Axis
from mpunlearn.server.axis_map import IDENTITY, AxisMap, concatenated, interleaved


class HeadOrder(NamedTuple):
    """A permutation of KV groups, and of the query heads within each group."""

    groups: torch.Tensor
    """The original KV group at each position, shape (groups,), int64."""
    heads: torch.Tensor
    """The original query head at each position, shape (heads,), int64."""


class RoleMaps(ABC):
    """A function-preserving map T of a model's weights.

    Args:
        architecture: the model's architecture, which determines the hidden spaces.
        device: device of the weights.
    """

    def __init__(self, architecture: Architecture, device: torch.device | None = None) -> None:
        self._architecture = architecture
        self._device = device or torch.device("cpu")
        # Several weights of a layer share each map; the maps of a few layers are cached.
        self._cached = lru_cache(maxsize=32)(self._axis)

    @abstractmethod
    def _residual(self) -> AxisMap:
        """A signed permutation of the residual stream."""

    @abstractmethod
    def _hidden(self, layer: int | None, expert: int | None) -> AxisMap:
        """A signed permutation of the hidden channels of an FFN or an expert; `gate` axes ignore the signs."""

    @abstractmethod
    def _query_key(self, layer: int | None) -> AxisMap:
        """One map per KV group (blocks or signs) that commutes with RoPE."""

    @abstractmethod
    def _value(self, layer: int | None) -> AxisMap:
        """One orthogonal block per KV group."""

    @abstractmethod
    def _head_order(self, layer: int | None) -> HeadOrder | None:
        """The order of groups and heads; None if they keep theirs."""

    @abstractmethod
    def _experts(self, layer: int | None) -> AxisMap:
        """A permutation of the experts of a layer."""

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

    def _axis(self, axis: Axis, layer: int | None, expert: int | None) -> AxisMap:
        parts = [self._map(role, layer, expert) for role in axis]
        if len(parts) == 1:
            return parts[0].to(self._device)
        sizes = [self._architecture.size((role,), expert is not None) for role in axis]
        return concatenated(parts, sizes).to(self._device)

    def _map(self, role: str, layer: int | None, expert: int | None) -> AxisMap:
        """The map of an axis role; shared by the whole model (residual), by a layer and expert (FFN), or by a layer."""
        if role in ("vocabulary", "head norm"):
            return IDENTITY
        if role in ("gate", "ffn"):
            hidden = self._hidden(layer, expert)
            return hidden if role == "ffn" else AxisMap(hidden.index)
        if role in ("residual", "norm"):
            residual = self._residual()
            return residual if role == "residual" else AxisMap(residual.index)
        return self._experts(layer) if role == "experts" else self._attention(role, layer)

    def _attention(self, role: str, layer: int | None) -> AxisMap:
        heads = self._architecture.heads
        if role == "qkv":
            query, key, value = (self._attention(part, layer) for part in ("query", "key", "value"))
            return interleaved(query, key, value, heads.count, heads.dim)
        per_head = role in ("query", "attended", "query norm")
        within = IDENTITY
        if role in ("query", "key"):
            within = self._query_key(layer)
        elif role in ("value", "attended"):
            within = self._value(layer)
        order, index = self._head_order(layer), None
        if order is not None:
            of_role = order.heads if per_head else order.groups
            index = (of_role[:, None] * heads.dim + torch.arange(heads.dim)).flatten()
        blocks, sign = within.blocks, within.sign
        if per_head:
            blocks = None if blocks is None else blocks.repeat_interleave(heads.per_group, dim=0)
            sign = None if sign is None else sign.view(heads.groups, -1).repeat_interleave(heads.per_group, 0).flatten()
        if sign is not None and index is not None:
            sign = sign[index]  # signs belong to the original head, but are applied after the permutation
        return AxisMap(index, sign, blocks)
