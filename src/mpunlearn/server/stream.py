"""Streaming a model through the server: pieces of tensors, a few at a time, on all cores.

The idea: memory must not grow with the model. A tensor whose rows stay where they are (an embedding, an LM head) is cut into
pieces of rows that know nothing of one another; any other tensor is one piece. Pieces are read, computed and written by a few
threads, each of which holds one at a time: torch, the cipher, hashing and file access all release the interpreter's lock.
Within a piece, arithmetic runs over chunks that fit the processor's cache.

Peak memory is about the number of threads times the largest piece: its rows once as stored and once per copy, and a few
chunks. Not covered: a single weight matrix so large that m copies of it in the storage dtype do not fit.
"""

import os
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from mpunlearn.architecture import TensorRole
from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.errors import PlanError
from mpunlearn.progress import bar
from mpunlearn.server.workspace import scratch

PIECE = 1 << 22
"""Entries of a piece of a tensor that can be cut."""
CHUNK = 1 << 18
"""Entries that are computed at once: what fits a processor's cache."""
DEVICE_CHUNK = 1 << 24
"""The same on an accelerator, which works best on much at once."""
THREADS = min(4, os.cpu_count() or 1)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class RowSlice:
    """Rows `start` … `stop` of one tensor; of a vector, entries."""

    name: str
    place: TensorRole
    start: int
    stop: int


def read(source: TensorDirectory, name: str, piece: RowSlice, purpose: str) -> torch.Tensor:
    """The rows of a piece, out of the tensor that `source` calls `name`, in the calling thread's scratch memory."""
    info = source.tensors[name]
    shape = (piece.stop - piece.start, *info.shape[1:])
    return source.read_rows(name, piece.start, piece.stop, out=scratch(purpose, shape, info.dtype))


def on_device(tensor: torch.Tensor, device: torch.device, purpose: str) -> torch.Tensor:
    """The tensor itself if it lies on that device, else a copy there, in scratch memory."""
    if tensor.device == device:
        return tensor
    return scratch(purpose, tuple(tensor.shape), tensor.dtype, device).copy_(tensor)


def arithmetic_device(name: str) -> torch.device:
    """The device that `--device` names, once it is known to be there.

    Raises:
        PlanError: there is no such device on this machine.
    """
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PlanError(f"--device {name}: not on this machine ({reason}); take cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise PlanError(f"--device: expected cpu or cuda, found {name}")
    return device


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on weights stored in `dtype`: float32, or float64 for float64 storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_slices(checkpoint: Checkpoint, places: Mapping[str, TensorRole]) -> list[RowSlice]:
    """A model in pieces, in the order of its tensors' names."""
    cut: list[RowSlice] = []
    for name, place in places.items():
        shape = checkpoint.tensors[name].shape
        rows, row = (
            shape[0],
            max(1, checkpoint.tensors[name].nbytes // checkpoint.tensors[name].dtype.itemsize // shape[0]),
        )
        step = max(1, PIECE // row) if place.axes[0] == ("vocabulary",) else rows
        cut += [RowSlice(name, place, start, min(start + step, rows)) for start in range(0, rows, step)]
    return cut


def chunks(rows: int, row: int, multiple: int, device: torch.device | None = None) -> list[tuple[int, int]]:
    """Ranges of rows of as many entries as a device (default: the processor) takes at once, each starting at a multiple of
    `multiple`.
    """
    size = CHUNK if device is None or device.type == "cpu" else DEVICE_CHUNK
    step = max(1, size // max(1, row) // multiple) * multiple
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def in_parallel(items: Collection[T], work: Callable[[T], R], what: str, weight: Callable[[T], int]) -> list[R]:
    """Calls `work` on every item from a few threads; results in the order of the items. The first exception stops all.

    Args:
        what: label of the progress bar.
        weight: how much of the bar an item is worth.
    """
    threads = torch.get_num_threads()
    results: list[R] = []
    pending: deque[tuple[T, Future[R]]] = deque()
    progress = bar(sum(map(weight, items)), what)
    # Parallelism lies between pieces: within one, a second thread of torch's would only get in the way.
    pool = ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,))

    def collect() -> None:
        item, future = pending.popleft()
        results.append(future.result())
        progress.update(weight(item))

    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > THREADS:
                collect()
        while pending:
            collect()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        progress.close()
    return results
