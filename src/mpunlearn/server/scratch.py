"""Memory that a thread uses again and again.

Fresh memory of a megabyte costs more than the arithmetic on it: the system hands it out page by page, and takes it back when
it is freed. The inner loops therefore write into buffers that each thread keeps.
"""

import math
import threading

import torch

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor that shares its memory with the calling thread's earlier ones of that name."""
    buffers: dict[tuple[str, torch.dtype], torch.Tensor] = _kept.__dict__.setdefault("buffers", {})
    count = math.prod(shape)
    buffer = buffers.get((name, dtype))
    if buffer is None or buffer.numel() < count:
        buffer = buffers[name, dtype] = torch.empty(count, dtype=dtype)
    return buffer[:count].view(shape)
