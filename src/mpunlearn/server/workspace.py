"""Reusable scratch memory for the worker threads.

Allocating a large buffer often takes longer than the arithmetic on it, because the operating system maps it page by
page and unmaps it when it is freed. The inner loops therefore borrow tensors from a `Workspace`, of which each worker
thread has its own.

Borrowing follows a stack discipline, like local variables: when a `frame()` ends, everything borrowed inside it is
returned. Two tensors that are borrowed at the same time never share memory.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Workspace:
    """The reusable buffers of one thread."""

    def __init__(self) -> None:
        self._buffers: dict[str, list[torch.Tensor]] = {}
        self._used: dict[str, int] = {}

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
        key = str(device)
        buffers, number = self._buffers.setdefault(key, []), self._used.get(key, 0)
        self._used[key] = number + 1
        nbytes = math.prod(shape) * dtype.itemsize
        if number == len(buffers):
            buffers.append(torch.empty(nbytes, dtype=torch.uint8, device=device))
        elif buffers[number].numel() < nbytes:
            buffers[number] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return buffers[number][:nbytes].view(dtype).view(shape)

    def copy(
        self, tensor: torch.Tensor, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Borrows a copy of a tensor, optionally in another dtype or on another device."""
        return self.empty(tuple(tensor.shape), dtype or tensor.dtype, device or tensor.device).copy_(tensor)
