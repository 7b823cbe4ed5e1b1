"""Writing safetensors shards."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from mpunlearn.checkpoint.reader import _CODES, TensorInfo, _bytes, _nbytes, _some
from mpunlearn.files import write_all, write_json

FLUSH_BYTES = 1 << 27
"""How much a writer lets pile up before it lets the disk begin, so that computing and syncing overlap."""


class TensorWriter:
    """Writes tensors of known names, dtypes and shapes into safetensors shards, in any order.

    Args:
        folder: an existing directory.
        specs: dtype and shape of every tensor that will be written.
        stem: "model" or "update"; one shard is STEM.safetensors, several get an index.
        max_shard_bytes: a shard takes tensors until the next would exceed this size.

    Use as a context manager: leaving it without an exception checks that every tensor was written and syncs the files.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
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

    def _open_shard(self, folder: Path, file: str, shard: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, (dtype, shape) in shard.items():
            end = start + _nbytes(dtype, shape)
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._files.append(descriptor)
        if hasattr(os, "posix_fallocate"):  # a full disk shows now, not after an hour
            os.posix_fallocate(descriptor, 0, 8 + len(text) + start)
        write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for name, (dtype, shape) in shard.items():
            first, last = header[name]["data_offsets"]
            info = TensorInfo(dtype, shape, file, 8 + len(text) + first, last - first)
            self._where[name] = (descriptor, info)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Puts one tensor at its place. Its dtype and shape must be the announced ones."""
        descriptor, info = self._where[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name}: announced {info.dtype} {info.shape}, given {tensor.dtype} {tuple(tensor.shape)}")
        self._put(descriptor, tensor, info.offset)
        self._missing.discard(name)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Puts rows of one tensor at their place, from row `start` on; for tensors written in pieces."""
        descriptor, info = self._where[name]
        if rows.dtype != info.dtype or tuple(rows.shape[1:]) != info.shape[1:] or start + len(rows) > info.shape[0]:
            raise ValueError(f"{name}: announced {info.dtype} {info.shape}, given {rows.dtype} {tuple(rows.shape)}")
        self._put(descriptor, rows, info.offset + start * (info.nbytes // max(1, info.shape[0])))
        self._missing.discard(name)

    def _put(self, descriptor: int, tensor: torch.Tensor, offset: int) -> None:
        """Writes, and now and then lets the disk begin with what it will have to hold in the end anyway."""
        write_all(descriptor, _bytes(tensor), offset)
        self._unsynced += tensor.nbytes
        if self._unsynced > FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            self._unsynced = 0
            self._flushing = self._flusher.submit(os.fsync, descriptor)

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
                    raise ValueError(f"never written: {_some(sorted(self._missing))}")
                for descriptor in self._files:
                    os.fsync(descriptor)
        finally:
            self._close()


def _plan_shards(
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int
) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Tensors in order of name, widest dtype first within a shard so that every tensor is aligned."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name in sorted(specs):
        size = _nbytes(*specs[name])
        if filled and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = specs[name]
        filled += size
    return [dict(sorted(shard.items(), key=lambda item: -item[1][0].itemsize)) for shard in shards]
