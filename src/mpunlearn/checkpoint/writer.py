"""Writing safetensors shards, with tensors in any order, whole or in parts.

All names, dtypes and shapes are given in advance. Shards and headers are laid out first, so every tensor has a fixed
position in its file before any value is known, and a checkpoint far larger than memory can be written while its tensors are
computed; also one shard at a time, by different machines. On a disk, space is reserved up front where the system supports
it, so a full disk is noticed at the start and not after an hour. In a store, a shard is uploaded in parts while it is
computed. The SHA-256 of each file is computed on the way (see `ordered`).

Not covered: making a directory appear atomically. Use `files.new_directory` for that, and write into it.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from mpunlearn.checkpoint.header import DTYPES, TensorInfo
from mpunlearn.checkpoint.ordered import FileHasher, InOrder
from mpunlearn.checkpoint.reader import listed, tensor_bytes
from mpunlearn.files import write_all
from mpunlearn.storage import PIECE_BYTES, Place, StorePath, write_json

FLUSH_BYTES = 1 << 27
"""After this many bytes, a writer starts syncing to disk in the background, while its caller keeps computing."""
MAX_SHARD_BYTES = 5_000_000_000
"""Default size of a shard."""
Spec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """The layout of one file of tensors."""

    file: str
    """Its name."""
    header: bytes
    """What the file begins with."""
    tensors: dict[str, TensorInfo]
    """Where each of its tensors goes."""
    size: int
    """Size of the file in bytes."""


def plan_shards(specs: Mapping[str, Spec], stem: str = "model", max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """The layout of a checkpoint: tensors are assigned to shards in order of name.

    Args:
        specs: dtype and shape of every tensor.
        stem: "model" or "update". A single shard is called STEM.safetensors; several are numbered and get an index.
        max_shard_bytes: a new shard starts when the next tensor would exceed this size.
    """
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name in sorted(specs):
        size = _byte_count(*specs[name])
        if filled and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = specs[name]
        filled += size
    many = len(shards)
    return [
        _laid_out(f"{stem}.safetensors" if many == 1 else f"{stem}-{i:05d}-of-{many:05d}.safetensors", shard)
        for i, shard in enumerate(shards, start=1)
    ]


def _laid_out(file: str, specs: Mapping[str, Spec]) -> Shard:
    """The layout of one file. Wider dtypes come first, for alignment."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    ordered = sorted(specs.items(), key=lambda item: -item[1][0].itemsize)
    for name, (dtype, shape) in ordered:
        end = start + _byte_count(dtype, shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    tensors = {
        name: TensorInfo(dtype, shape, file, first + header[name]["data_offsets"][0], _byte_count(dtype, shape))
        for name, (dtype, shape) in ordered
    }
    return Shard(file, len(text).to_bytes(8, "little") + text, tensors, first + start)


def write_index(folder: Place, shards: Iterable[Shard], stem: str = "model") -> None:
    """Writes the index of a checkpoint, if it has several shards."""
    infos = {name: info for shard in shards for name, info in shard.tensors.items()}
    if len({info.file for info in infos.values()}) > 1:
        write_json(
            folder / f"{stem}.safetensors.index.json",
            {
                "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
                "weight_map": {name: infos[name].file for name in sorted(infos)},
            },
        )


class ShardWriter:
    """Writes one shard. Use as a context manager.

    Leaving the block without an exception checks that every tensor was written, and syncs the file. With an exception, a
    file on a disk stays as it is, and one in a store does not come to be.

    Args:
        folder: an existing directory, or one in a store.
        shard: the layout.
        name: name of the file while it is written (default: that of the layout).

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor differs from its spec, or was never written.
    """

    def __init__(self, folder: Place, shard: Shard, name: str = "") -> None:
        self.shard = shard
        self.sha256 = ""
        """SHA-256 (hex) of the file, after the block."""
        self._missing = set(shard.tensors)
        self._place = folder / (name or shard.file)
        self._file = (_StoredFile if isinstance(self._place, StorePath) else _LocalFile)(self._place, shard.size)
        self._file.put(0, memoryview(shard.header))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a whole tensor. Its dtype and shape must match its spec."""
        info = self.shard.tensors[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name}: expected {info.dtype} {info.shape}, found {tensor.dtype} {tuple(tensor.shape)}")
        self._file.put(info.offset, tensor_bytes(tensor))
        self._missing.discard(name)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Writes part of a tensor: rows of its first axis, starting at `start`.

        A single call marks the tensor as written, so the caller must make sure that all rows are.
        """
        info = self.shard.tensors[name]
        if rows.dtype != info.dtype or tuple(rows.shape[1:]) != info.shape[1:] or start + len(rows) > info.shape[0]:
            raise ValueError(
                f"{name}: expected rows of {info.dtype} {info.shape}, found {rows.dtype} {tuple(rows.shape)} at {start}"
            )
        self._file.put(info.offset + start * (info.nbytes // max(1, info.shape[0])), tensor_bytes(rows))
        self._missing.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._missing:
            error = ValueError(f"never written: {listed(sorted(self._missing))}")
            self._file.close(error)
            raise error
        self.sha256 = self._file.close(error)


class _LocalFile:
    """A file on a disk, whose parts are written in any order."""

    def __init__(self, path: Place, size: int) -> None:
        assert isinstance(path, Path)
        self._hasher = FileHasher(path, size)
        self._unsynced = 0
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):  # fails now if the disk is full
                os.posix_fallocate(self._descriptor, 0, size)
        except BaseException:
            os.close(self._descriptor)
            raise

    def put(self, start: int, part: memoryview) -> None:
        """Writes a part. Starts a background sync if enough bytes are unsynced and no sync is running."""
        write_all(self._descriptor, part, start)
        self._hasher.add(start, part)
        self._unsynced += len(part)
        if self._unsynced > FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            self._check_flush()
            self._unsynced = 0
            self._flushing = self._flusher.submit(os.fsync, self._descriptor)

    def _check_flush(self) -> None:
        """Waits for the latest sync and raises its error, since the system reports it only once."""
        if self._flushing is not None:
            self._flushing.result()

    def close(self, error: BaseException | None) -> str:
        """Syncs the file and returns its digest; after an error, only closes it."""
        try:
            if error is not None:
                return ""
            self._check_flush()
            os.fsync(self._descriptor)
            return self._hasher.hexdigest()
        finally:
            self._flusher.shutdown()
            os.close(self._descriptor)


class _StoredFile:
    """A file in a store, which is written in parts, in order."""

    def __init__(self, path: Place, size: int) -> None:
        assert isinstance(path, StorePath)
        self._path, self._size, self._sha256 = path, size, hashlib.sha256()
        self._order = InOrder(self._emit, lambda start, part: _held(bytes(part)))
        self._writing = ExitStack()
        self._upload = self._writing.enter_context(path.writing())

    def put(self, start: int, part: memoryview) -> None:
        """Sends a part, or holds it until what comes before it is there."""
        self._order.add(start, part)

    def _emit(self, part: memoryview) -> None:
        for start in range(0, len(part), PIECE_BYTES):
            self._upload.write(bytes(part[start : start + PIECE_BYTES]))  # the library sends it later, without a copy
        self._sha256.update(part)

    def close(self, error: BaseException | None) -> str:
        """Completes the file and returns its digest; after an error, there is no file."""
        if error is None and self._order.next != self._size:
            error = ValueError(f"{self._path}: {self._order.next} of {self._size} bytes were written")
            self._writing.__exit__(type(error), error, None)
            raise error
        self._writing.__exit__(type(error) if error else None, error, None)
        return self._sha256.hexdigest()


def _held(part: bytes) -> Callable[[], Iterable[memoryview]]:
    return lambda: (memoryview(part),)


class TensorWriter:
    """Writes tensors into the shards of a checkpoint. Use as a context manager; it works like `ShardWriter`.

    Args:
        folder: an existing directory, or one in a store.
        specs: dtype and shape of every tensor that will be written.
        stem: as for `plan_shards`.
        max_shard_bytes: as for `plan_shards`.

    Raises:
        OSError: the files cannot be written.
        ValueError: a tensor differs from its spec, or was never written.
    """

    def __init__(
        self,
        folder: Place,
        specs: Mapping[str, Spec],
        stem: str = "model",
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._stack = ExitStack()
        self._writers: list[ShardWriter] = []
        self._of: dict[str, ShardWriter] = {}
        shards = plan_shards(specs, stem, max_shard_bytes)
        with self._stack:
            for shard in shards:
                writer = self._stack.enter_context(ShardWriter(folder, shard))
                self._writers.append(writer)
                self._of.update(dict.fromkeys(shard.tensors, writer))
            write_index(folder, shards, stem)
            self._stack = self._stack.pop_all()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a whole tensor. Its dtype and shape must match its spec."""
        self._of[name].write(name, tensor)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Writes part of a tensor, as `ShardWriter.write_rows`."""
        self._of[name].write_rows(name, start, rows)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of each file, after the block."""
        return {writer.shard.file: writer.sha256 for writer in self._writers}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _byte_count(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)
