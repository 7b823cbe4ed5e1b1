"""Streams a model through the server's passes: a few slices of tensors at a time, on several threads.

The idea: memory use must not grow with the size of the model. A tensor whose rows are not permuted (embedding, LM head)
is cut into independent slices of rows; any other tensor is a single slice. Each of a few threads reads, computes and
writes one slice at a time; threads suffice because torch, the cipher, hashing and file access all release the GIL.
Within a slice, arithmetic runs over chunks that fit into the CPU cache.

Peak memory is roughly the number of threads times the size of the largest slice with its m published copies, plus a few
chunks. Not covered: a single weight matrix so large that m copies of it do not fit into memory.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch

from mpunlearn.architecture import TensorRole
from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.errors import PlanError
from mpunlearn.progress import Progress
from mpunlearn.server.workspace import Workspace

SLICE_ENTRIES = 1 << 22
"""Number of entries in a slice of a tensor that can be cut into rows."""
CHUNK_ENTRIES = 1 << 18
"""Number of entries computed at once on the CPU, so that they fit into its cache."""
DEVICE_CHUNK_ENTRIES = 1 << 24
"""The same for a GPU, which is most efficient on large chunks."""
THREADS = min(4, os.cpu_count() or 1)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class RowSlice:
    """Rows `start` … `stop` - 1 of a matrix, or entries of a vector."""

    name: str
    role: TensorRole
    start: int
    stop: int
    number: int = 0
    """Index of the slice within its tensor."""

    def __len__(self) -> int:
        return self.stop - self.start


def row_slices(checkpoint: Checkpoint, roles: Mapping[str, TensorRole]) -> list[RowSlice]:
    """Cuts a model into slices, in the order of `roles`."""
    slices: list[RowSlice] = []
    for name, role in roles.items():
        info = checkpoint.tensors[name]
        rows = info.shape[0]
        row_entries = max(1, info.nbytes // info.dtype.itemsize // rows)
        step = max(1, SLICE_ENTRIES // row_entries) if role.axes[0] == ("vocabulary",) else rows
        starts = enumerate(range(0, rows, step))
        slices += [RowSlice(name, role, start, min(start + step, rows), number) for number, start in starts]
    return slices


def read(source: TensorDirectory, name: str, rows: RowSlice, workspace: Workspace) -> torch.Tensor:
    """Reads the rows of a slice from the tensor that is called `name` in `source`."""
    info = source.tensors[name]
    out = workspace.empty((len(rows), *info.shape[1:]), info.dtype)
    return source.read_rows(name, rows.start, rows.stop, out=out)


def on_device(tensor: torch.Tensor, device: torch.device, workspace: Workspace) -> torch.Tensor:
    """Returns the tensor itself if it is on that device, otherwise a copy on it."""
    return tensor if tensor.device == device else workspace.copy(tensor, device=device)


def arithmetic_device(name: str) -> torch.device:
    """The device named by `--device`.

    Raises:
        PlanError: it is neither cpu nor cuda, or is not available on this machine.
    """
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PlanError(f"--device {name}: not available on this machine ({reason}); use cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise PlanError(f"--device: expected cpu or cuda, found {name}")
    return device


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights stored as `dtype` are processed: float32, or float64 for float64 storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(
    rows: int,
    row_entries: int,
    multiple: int,
    device: torch.device | None = None,
    *,
    first: int = 0,
    block: int = 1,
) -> list[tuple[int, int]]:
    """Cuts rows into ranges (start, stop) with as many entries as the device should compute at once.

    Args:
        rows: number of rows.
        row_entries: number of entries in a row.
        multiple: every range starts at a multiple of this number of rows.
        device: the device (default: CPU).
        first: number of rows of the tensor before these.
        block: if the ranges stay about as large, all but the first start at a multiple of this number of entries of the
            whole tensor.
    """
    size = CHUNK_ENTRIES if device is None or device.type == "cpu" else DEVICE_CHUNK_ENTRIES
    step = max(1, size // max(1, row_entries) // multiple) * multiple
    aligned = math.lcm(multiple, block // math.gcd(block, max(1, row_entries)))
    if aligned <= 2 * step:
        step = max(1, step // aligned) * aligned
    cuts = [0, *range(step - first % step, rows, step), rows]
    return [(start, stop) for start, stop in pairwise(cuts) if stop > start]


def in_parallel(
    items: Collection[T],
    work: Callable[[T, Workspace], R],
    what: str,
    weight: Callable[[T], int],
    threads: int = THREADS,
) -> list[R]:
    """Calls `work` on every item from several threads. The first exception stops all of them.

    Args:
        items: the items.
        work: called with an item and the thread's workspace, in its own frame.
        what: label of the progress bar.
        weight: the share of an item in the progress.
        threads: number of threads.

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
    # Slices run in parallel, so torch's own multithreading would only cause oversubscription.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def collect() -> None:
        item, future = pending.popleft()
        results.append(future.result())
        task.update(weight(item))

    try:
        with Progress(sum(map(weight, items)), what) as task:
            for item in items:
                pending.append((item, pool.submit(framed, item)))
                if len(pending) > threads:
                    collect()
            while pending:
                collect()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)
    return results
