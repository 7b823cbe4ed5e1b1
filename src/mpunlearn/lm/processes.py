"""Training one model on several processes, started by `torchrun` or `accelerate launch`."""

import os

import torch
import torch.distributed


def processes() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The index of this process, counted from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes files and reports progress."""
    return rank() == 0


def total(value: float, device: torch.device) -> float:
    """Sums a number over all processes."""
    if processes() == 1:
        return value
    number = torch.tensor(value, device=device, dtype=torch.float64)
    torch.distributed.all_reduce(number)
    return float(number)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a tensor that may be sharded over processes. All processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
