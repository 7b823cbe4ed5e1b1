"""Streaming a model through the server: slices of tensors, a few at a time, on all cores.

The idea: memory must not grow with the model. A tensor whose rows stay where they are (an embedding, an LM head) is cut into
slices of rows that are independent of one another; any other tensor is one slice. A few threads read, compute and write slices,
one at a time each: torch, the cipher, hashing and file access all release the interpreter lock. Within a slice, arithmetic runs
over chunks that fit into the processor's cache.

Peak memory is about the number of threads times the largest slice: its rows as stored, one copy of them per published copy, and
a few chunks. Not covered: a single weight matrix so large that m copies of it do not fit into memory.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from mpunlearn.architecture import TensorRole
from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.errors import PlanError
from mpunlearn.progress import Progress
from mpunlearn.server.workspace import Workspace

SLICE_ENTRIES = 1 << 22
"""Entries in a slice of a tensor that can be cut."""
CHUNK_ENTRIES = 1 << 18
"""Entries that are computed at once, so that they fit into a processor's cache."""
DEVICE_CHUNK_ENTRIES = 1 << 24
"""The same on an accelerator, which works best on much at once."""
THREADS = min(4, os.cpu_count() or 1)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class RowSlice:
    """Rows `start` … `stop` of one tensor; of a vector, entries."""

    name: str
    role: TensorRole
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def row_slices(checkpoint: Checkpoint, roles: Mapping[str, TensorRole]) -> list[RowSlice]:
    """A model in slices, in the order of its tensors' names."""
    slices: list[RowSlice] = []
    for name, role in roles.items():
        info = checkpoint.tensors[name]
        rows = info.shape[0]
        row_entries = max(1, info.nbytes // info.dtype.itemsize // rows)
        step = max(1, SLICE_ENTRIES // row_entries) if role.axes[0] == ("vocabulary",) else rows
        slices += [RowSlice(name, role, start, min(start + step, rows)) for start in range(0, rows, step)]
    return slices


def read(source: TensorDirectory, name: str, rows: RowSlice, workspace: Workspace) -> torch.Tensor:
    """The rows of a slice, from the tensor that `source` calls `name`."""
    info = source.tensors[name]
    out = workspace.empty((len(rows), *info.shape[1:]), info.dtype)
    return source.read_rows(name, rows.start, rows.stop, out=out)


def on_device(tensor: torch.Tensor, device: torch.device, workspace: Workspace) -> torch.Tensor:
    """The tensor itself if it is on that device, or else a copy that is."""
    return tensor if tensor.device == device else workspace.copy(tensor, device=device)


def arithmetic_device(name: str) -> torch.device:
    """The device that `--device` names, after checking that it exists.

    Raises:
        PlanError: there is no such device on this machine.
    """
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PlanError(f"--device {name}: not available on this machine ({reason}); take cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise PlanError(f"--device: expected cpu or cuda, found {name}")
    return device


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on weights that are stored in `dtype`: float32, or float64 for float64 storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(rows: int, row_entries: int, multiple: int, device: torch.device | None = None) -> list[tuple[int, int]]:
    """Ranges of rows with as many entries as a device computes at once.

    Args:
        rows: how many rows there are.
        row_entries: entries in a row.
        multiple: every range starts at a multiple of this many rows.
        device: default: the processor.
    """
    size = CHUNK_ENTRIES if device is None or device.type == "cpu" else DEVICE_CHUNK_ENTRIES
    step = max(1, size // max(1, row_entries) // multiple) * multiple
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def in_parallel(
    items: Collection[T], work: Callable[[T, Workspace], R], what: str, weight: Callable[[T], int]
) -> list[R]:
    """Calls `work` on every item from a few threads; the first exception stops all of them.

    Args:
        items: what to work on.
        work: called with an item and the thread's workspace, in a frame of its own.
        what: label of the progress bar.
        weight: how much of the progress an item is worth.

    Returns:
        The results in the order of the items.
    """
    local = threading.local()

    def framed(item: T) -> R:
        workspace: Workspace = local.__dict__.setdefault("workspace", Workspace())
        with workspace.frame():
            return work(item, workspace)

    torch_threads = torch.get_num_threads()
    results: list[R] = []
    pending: deque[tuple[T, Future[R]]] = deque()
    # Slices run in parallel; within one, torch's own threads would only get in the way.
    pool = ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,))

    def collect() -> None:
        item, future = pending.popleft()
        results.append(future.result())
        task.update(weight(item))

    try:
        with Progress(sum(map(weight, items)), what) as task:
            for item in items:
                pending.append((item, pool.submit(framed, item)))
                if len(pending) > THREADS:
                    collect()
            while pending:
                collect()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)
    return results
