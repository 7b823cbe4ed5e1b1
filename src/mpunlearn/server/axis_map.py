"""Orthogonal maps along one axis of a weight, the building blocks of a reparameterization.

A map is a block-diagonal rotation followed by a signed permutation. The signed permutation involves no rounding, so it
commutes with the cast to the storage dtype and can be undone exactly. This module applies maps to weights and inverts
them on updates.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class AxisMap:
    """An orthogonal map along one axis: y[i] = sign[i] · (B x)[index[i]], with a block-diagonal matrix B.

    A part that is None is the identity. `rotate` applies B, `arrange` the signed permutation, `apply` both.
    """

    index: torch.Tensor | None = None
    """A permutation, shape (n,), int64."""
    sign: torch.Tensor | None = None
    """±1, shape (n,), float64."""
    blocks: torch.Tensor | None = None
    """The diagonal blocks of B, orthogonal matrices, shape (n/d, d, d), float64."""

    @property
    def identity(self) -> bool:
        """Whether the map changes nothing."""
        return self.index is None and self.sign is None and self.blocks is None

    @cached_property
    def inverse(self) -> torch.Tensor | None:
        """The inverse permutation, shape (n,), int64: entry i of x becomes entry inverse[i] of y."""
        return None if self.index is None else torch.argsort(self.index)

    def to(self, device: torch.device) -> "AxisMap":
        """The same map for tensors on another device."""
        parts = (self.index, self.sign, self.blocks)
        return AxisMap(*(None if part is None else part.to(device) for part in parts))

    @property
    def block(self) -> int:
        """Size d of the blocks of B; 1 without rotations."""
        return 1 if self.blocks is None else self.blocks.shape[-1]

    def apply(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Applies the map along `axis` of x (float32 or float64)."""
        return self.arrange(self.rotate(x, axis), axis)

    def invert(self, y: torch.Tensor, axis: int) -> torch.Tensor:
        """Applies the inverse map, which is the transpose, along `axis`."""
        return self.rotate(self.rearrange(y, axis), axis, transpose=True)

    def rotate(self, x: torch.Tensor, axis: int, start: int = 0, transpose: bool = False) -> torch.Tensor:
        """Applies B or its transpose along `axis` of x, which holds the entries from `start` (a multiple of d) on."""
        if self.blocks is None:
            return x
        d = self.block
        blocks = self.blocks[start // d : start // d + x.shape[axis] // d].to(x.dtype)
        moved = x.movedim(axis, 0)
        product = torch.matmul(blocks.mT if transpose else blocks, moved.reshape(len(blocks), d, -1))
        return product.reshape(moved.shape).movedim(0, axis)

    def arrange(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Applies the signed permutation along `axis`, in any dtype, without rounding."""
        x = x if self.index is None else _taken(x, self.index, axis)
        return x if self.sign is None else _flipped(x, self.sign, axis)

    def scatter(self, out: torch.Tensor, rows: torch.Tensor, start: int) -> None:
        """`arrange` along axis 0 for some rows of x, from row `start` on: writes them to their positions in `out`."""
        stop = start + len(rows)
        positions = slice(start, stop) if self.inverse is None else self.inverse[start:stop]
        if self.sign is not None:
            rows = _flipped(rows, self.sign[positions], 0)
        if isinstance(positions, slice) or out.device.type != "cpu":
            out[positions] = rows
        else:
            _bits(out).numpy()[positions.numpy()] = _bits(rows).numpy()

    def gather(self, y: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The inverse of `scatter`: returns rows `start` … `stop` - 1 of x, given all of y."""
        positions = slice(start, stop) if self.inverse is None else self.inverse[start:stop]
        rows = y[positions] if isinstance(positions, slice) else _taken(y, positions, 0)
        return rows if self.sign is None else _flipped(rows, self.sign[positions], 0)

    def rearrange(self, y: torch.Tensor, axis: int) -> torch.Tensor:
        """Applies the inverse of `arrange` along `axis`."""
        if self.sign is not None:
            y = _flipped(y, self.sign, axis)
        return y if self.inverse is None else _taken(y, self.inverse, axis)


IDENTITY = AxisMap()


def concatenated(maps: list[AxisMap], sizes: list[int]) -> AxisMap:
    """The map of a concatenation of several axes, given the map and the size of each."""
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
    if any(part.blocks is not None for part in maps):
        d = max(part.block for part in maps)
        eye = torch.eye(d, dtype=torch.float64)
        blocks = torch.cat(
            [
                eye.expand(n // d, d, d) if part.blocks is None else part.blocks
                for part, n in zip(maps, sizes, strict=True)
            ]
        )
    return AxisMap(index, sign, blocks)


def interleaved(query: AxisMap, key: AxisMap, value: AxisMap, heads: int, dim: int) -> AxisMap:
    """The map of q, k and v interleaved by head (heads x 3 x dim), for attention without grouped queries."""
    whole = concatenated([query, key, value], [heads * dim] * 3)

    def deal(x: torch.Tensor) -> torch.Tensor:
        """Reorders (3, heads, …) to (heads, 3, …), with the first two axes flattened."""
        return x.view(3, heads, *x.shape[1:]).transpose(0, 1).flatten(0, 1)

    # Position of each interleaved entry in the concatenation, and the inverse.
    order = deal(torch.arange(3 * heads * dim).view(3 * heads, dim)).flatten()
    inverse = torch.argsort(order)
    return AxisMap(
        None if whole.index is None else inverse[whole.index[order]],
        None if whole.sign is None else whole.sign[order],
        None if whole.blocks is None else deal(whole.blocks),
    )


def plane_rotations(angles: torch.Tensor) -> torch.Tensor:
    """Rotations that commute with RoPE: by angle i in the plane of the entries (i, i + d/2).

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


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same size, whose copies NumPy makes several times faster than torch."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def _taken(x: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    """`x.index_select(axis, index)`."""
    if x.device.type != "cpu":
        return x.index_select(axis, index)
    return torch.from_numpy(np.take(_bits(x).numpy(), index.numpy(), axis)).view(x.dtype)


def _flipped(x: torch.Tensor, sign: torch.Tensor, axis: int) -> torch.Tensor:
    """Multiplies by ±1 along an axis: flips the sign bits, without arithmetic."""
    bits = _bits(x)
    flip = torch.where(sign < 0, torch.iinfo(bits.dtype).min, 0).to(bits.dtype)
    return bits.bitwise_xor(flip.view([-1 if i == axis else 1 for i in range(x.dim())])).view(x.dtype)
