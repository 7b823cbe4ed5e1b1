"""Reusable scratch memory for the worker threads.

Allocating a large buffer often takes longer than the arithmetic on it, because the operating system maps it page by
page and unmaps it when it is freed. The inner loops therefore borrow tensors from a `Workspace`, of which each worker
thread has its own.

Borrowing follows a stack discipline, like local variables: when a `frame()` ends, everything borrowed inside it is
returned. Two tensors that are borrowed at the same time never share memory.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Place = tuple[torch.device, int]
"""A device, and how many tensors were borrowed there before."""


class Workspace:
    """The reusable buffers of one thread."""

    def __init__(self) -> None:
        self._buffers: dict[Place, torch.Tensor] = {}
        self._views: dict[tuple[Place, tuple[int, ...], torch.dtype], torch.Tensor] = {}
        self._used: dict[torch.device, int] = {}
        self._kept: dict[str, Any] = {}

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Returns all tensors borrowed inside the block when it ends; later tensors overwrite them."""
        used = dict(self._used)
        try:
            yield
        finally:
            self._used = used

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Borrows an uninitialized tensor until the end of the current frame."""
        if isinstance(device, str):
            device = torch.device(device)
        number = self._used.get(device, 0)
        self._used[device] = number + 1
        place = (device, number)
        known = self._views.get((place, shape, dtype))
        if known is not None:
            return known
        nbytes, buffer = math.prod(shape) * dtype.itemsize, self._buffers.get(place)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._buffers[place] = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self._views = {key: view for key, view in self._views.items() if key[0] != place}
        view = self._views[place, shape, dtype] = buffer[:nbytes].view(dtype).view(shape)
        return view

    def copy(
        self, tensor: torch.Tensor, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Borrows a copy of a tensor, optionally in another dtype or on another device."""
        return self.empty(tuple(tensor.shape), dtype or tensor.dtype, device or tensor.device).copy_(tensor)

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """An object that lives as long as the workspace, such as memory with its views; made when it is first needed."""
        if name not in self._kept:
            self._kept[name] = make()
        kept: T = self._kept[name]
        return kept
