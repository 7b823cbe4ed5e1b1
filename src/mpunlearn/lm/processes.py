"""Training one model on several processes, on one machine or more, started by `torchrun` or `accelerate launch`.

Both set the environment variables that are read here. The processes must see the same files: the copy, the memory folder
and the update are in folders that all machines share. What several processes write together becomes visible complete or
not at all, and a failure in one of them is an error in all of them.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from mpunlearn.errors import FileError, MPUError
from mpunlearn.files import new_directory

TIMEOUT = timedelta(hours=2)
"""How long processes wait for each other; one may read its shard much faster than another."""
T = TypeVar("T")


def processes() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The index of this process, counted from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that reports progress, and writes what only one process writes."""
    return rank() == 0


def connect() -> None:
    """Connects this process to the others, if there are several, and selects its GPU if it has one."""
    if processes() == 1 or torch.distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Tensors that are offloaded to the CPU are reduced by gloo.
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    atexit.register(_disconnect)


def _disconnect() -> None:
    """Stops the threads of the process group, which must not outlive the interpreter."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def compute_device(parameter: torch.Tensor) -> torch.device:
    """The device that computes with a parameter; its shard may be kept on the CPU."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or mesh.device_type == "cpu":
        return parameter.device
    return torch.device(mesh.device_type, torch.cuda.current_device())


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


def from_main(value: Any) -> Any:
    """The value that the main process has. All processes must call this."""
    if processes() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def gathered(items: Sequence[T], compute: Callable[[list[T]], list[float]]) -> list[float]:
    """Computes one number for each item, with the items divided among the processes. All processes must call this.

    Each process gets equally many items, so that they can work in step; some get an item twice.
    """
    if processes() == 1 or not items:
        return compute(list(items))
    share = -(-len(items) // processes())
    mine = [items[min(rank() * share + i, len(items) - 1)] for i in range(share)]
    parts: list[list[float]] = [[]] * processes()
    torch.distributed.all_gather_object(parts, compute(mine))
    return [value for part in parts for value in part][: len(items)]


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that fails in all processes if it fails in one. At its end, they wait for each other.

    Raises:
        MPUError: the error of another process, of the same class and with the same message.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if processes() > 1:
        found: list[tuple[type[MPUError], str] | None] = [None] * processes()
        torch.distributed.all_gather_object(found, None if error is None else _portable(error))
        others = [entry for entry in found if entry is not None]
        if error is None and others:
            kind, message = others[0]
            raise kind(message)
    if error is not None:
        raise error


def _portable(error: Exception) -> tuple[type[MPUError], str]:
    """Class and message of an error, as other processes can raise it."""
    if isinstance(error, MPUError):
        return type(error), str(error)
    return FileError, f"process {rank()}: {type(error).__name__}: {error}"


@contextmanager
def new_directory_together(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """`files.new_directory` for all processes: each of them writes its files into the same temporary directory.

    The directory appears under its name when the block has ended in all processes. If it fails in one of them, nothing
    is left behind, and all of them raise an error.

    Raises:
        FileError: as for `new_directory`, or the processes do not share a file system.
    """
    with ExitStack() as stack:
        folder = path
        with all_or_none():
            if is_main():
                folder = stack.enter_context(new_directory(path, mode))
        folder = from_main(folder)
        with all_or_none():
            if not folder.is_dir():
                raise FileError(f"{path}: process {rank()} does not see it; use a folder that all machines share")
            yield folder
        with all_or_none():
            stack.close()
