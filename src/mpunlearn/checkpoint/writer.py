"""Writing safetensors shards, with tensors in any order, whole or in parts.

All names, dtypes and shapes are given in advance. Shards and headers are laid out first, so every tensor has a fixed
position on disk before any value is known, and a checkpoint far larger than memory can be written while its tensors are
computed. Disk space is reserved up front where the system supports it, so a full disk is noticed at the start and not
after an hour.

Not covered: making a directory appear atomically. Use `files.new_directory` for that, and write into it.
"""

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from mpunlearn.checkpoint.reader import DTYPES, TensorInfo, listed, tensor_bytes
from mpunlearn.files import write_all, write_json

FLUSH_BYTES = 1 << 27
"""After this many bytes, a writer starts syncing to disk in the background, while its caller keeps computing."""
Spec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorWriter:
    """Writes tensors into safetensors shards. Use as a context manager.

    Leaving the block without an exception checks that every tensor was written, and syncs the files.

    Args:
        folder: an existing directory.
        specs: dtype and shape of every tensor that will be written.
        stem: "model" or "update". A single shard is called STEM.safetensors; several are numbered and get an index.
        max_shard_bytes: a new shard starts when the next tensor would exceed this size.

    Raises:
        OSError: the files cannot be written.
        ValueError: a tensor differs from its spec, or was never written.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, Spec],
        stem: str = "model",
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        self._missing = set(specs)
        self._where: dict[str, tuple[int, TensorInfo]] = {}
        self._files: list[int] = []
        self._unsynced = 0
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        shards = _plan_shards(specs, max_shard_bytes)
        files = [
            f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
            for i in range(1, len(shards) + 1)
        ]
        try:
            for file, shard in zip(files, shards, strict=True):
                self._open_shard(folder, file, shard)
            if len(shards) > 1:
                total = sum(info.nbytes for _, info in self._where.values())
                weight_map = {name: self._where[name][1].file for name in sorted(self._where)}
                write_json(
                    folder / f"{stem}.safetensors.index.json",
                    {"metadata": {"total_size": total}, "weight_map": weight_map},
                )
        except BaseException:
            self._close()
            raise

    def _open_shard(self, folder: Path, file: str, shard: dict[str, Spec]) -> None:
        """Creates a shard with its header, and records where each of its tensors goes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, (dtype, shape) in shard.items():
            end = start + _byte_count(dtype, shape)
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._files.append(descriptor)
        if hasattr(os, "posix_fallocate"):  # fails now if the disk is full
            os.posix_fallocate(descriptor, 0, 8 + len(text) + start)
        write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for name, (dtype, shape) in shard.items():
            first, last = header[name]["data_offsets"]
            info = TensorInfo(dtype, shape, file, 8 + len(text) + first, last - first)
            self._where[name] = (descriptor, info)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a whole tensor. Its dtype and shape must match its spec."""
        descriptor, info = self._where[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name}: expected {info.dtype} {info.shape}, found {tensor.dtype} {tuple(tensor.shape)}")
        self._put(descriptor, tensor, info.offset)
        self._missing.discard(name)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Writes part of a tensor: rows of its first axis, starting at `start`.

        A single call marks the tensor as written, so the caller must make sure that all rows are.
        """
        descriptor, info = self._where[name]
        if rows.dtype != info.dtype or tuple(rows.shape[1:]) != info.shape[1:] or start + len(rows) > info.shape[0]:
            raise ValueError(
                f"{name}: expected rows of {info.dtype} {info.shape}, found {rows.dtype} {tuple(rows.shape)} at {start}"
            )
        self._put(descriptor, rows, info.offset + start * (info.nbytes // max(1, info.shape[0])))
        self._missing.discard(name)

    def _put(self, descriptor: int, tensor: torch.Tensor, offset: int) -> None:
        """Writes a tensor. Starts a background sync if enough bytes are unsynced and no sync is running."""
        write_all(descriptor, tensor_bytes(tensor), offset)
        self._unsynced += tensor.nbytes
        if self._unsynced > FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            self._check_flush()
            self._unsynced = 0
            self._flushing = self._flusher.submit(os.fsync, descriptor)

    def _check_flush(self) -> None:
        """Waits for the latest sync and raises its error, since the system reports it only once."""
        if self._flushing is not None:
            self._flushing.result()

    def _close(self) -> None:
        self._flusher.shutdown()
        for descriptor in self._files:
            os.close(descriptor)
        self._files = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"never written: {listed(sorted(self._missing))}")
                self._check_flush()
                for descriptor in self._files:
                    os.fsync(descriptor)
        finally:
            self._close()


def _plan_shards(specs: Mapping[str, Spec], limit: int) -> list[dict[str, Spec]]:
    """The tensors of each shard, assigned in order of name. Within a shard, wider dtypes come first, for alignment."""
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name in sorted(specs):
        size = _byte_count(*specs[name])
        if filled and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = specs[name]
        filled += size
    return [dict(sorted(shard.items(), key=lambda item: -item[1][0].itemsize)) for shard in shards]


def _byte_count(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)
