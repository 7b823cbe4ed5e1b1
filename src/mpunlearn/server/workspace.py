"""Memory that a thread uses again and again.

Fresh memory of a megabyte costs more than the arithmetic on it: the system hands it out page by page, and takes it back when
it is freed. The inner loops therefore write into buffers that each thread keeps.
"""

import math
import threading

import torch

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """An uninitialized tensor that shares its memory with the calling thread's earlier ones of that name."""
    buffers: dict[tuple[str, torch.dtype, str], torch.Tensor] = _kept.__dict__.setdefault("buffers", {})
    count, key = math.prod(shape), (name, dtype, str(device))
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < count:
        buffer = buffers[key] = torch.empty(count, dtype=dtype, device=device)
    return buffer[:count].view(shape)
