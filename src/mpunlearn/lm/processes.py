"""Several processes that train one model together, as `torchrun` and `accelerate launch` start them."""

import os

import torch
import torch.distributed


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes what all of them computed."""
    return rank() == 0


def total(value: float, device: torch.device) -> float:
    """The sum of a number over all processes."""
    if processes() == 1:
        return value
    number = torch.tensor(value, device=device, dtype=torch.float64)
    torch.distributed.all_reduce(number)
    return float(number)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded over processes, all of which must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
