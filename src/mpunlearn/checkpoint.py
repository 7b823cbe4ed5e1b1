"""Checkpoint directories on disk: lazy reading, sharded writing, and nothing half-written.

The idea: the unit of exchange is a Hugging Face checkpoint directory (config.json, tokenizer, safetensors shards and their
index), so any training tool can read what we publish and produce what we accept. This is the only module that knows that
layout. Tensors are read one at a time with `pread` rather than through a memory map, so that resident memory is what the
caller holds and not the pages that happened to be touched; headers are validated by the safetensors library itself, which
is also the only format ever opened (a pickle can run code).

Writing needs every name, shape and dtype beforehand: the shards' headers are laid out first, so tensors may then arrive in
any order. The directories themselves appear whole or not at all (`files`).

Not covered: quantised number formats, and files other than safetensors.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from mpunlearn.errors import CheckpointError
from mpunlearn.files import read_json, write_all, write_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The safetensors dtype codes that are read and written; others (fp8, packed formats) are refused by name."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}

FLOAT_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""The names under which a storage dtype can be asked for."""

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files carried from a checkpoint to what is made of it. A list of names, not "everything else": a training folder may
also hold optimiser states or logs, which must not be published."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_HEADER_LIMIT = 100_000_000
FLUSH_BYTES = 1 << 27
"""How much a writer lets pile up before it lets the disk begin, so that computing and syncing overlap."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


class TensorDirectory:
    """The tensors of a directory of safetensors files, read lazily.

    Args:
        path: a directory with `STEM.safetensors`, or with `STEM.safetensors.index.json` and the shards that it names.
        stem: "model" for checkpoints, "update" for updates.

    Raises:
        CheckpointError: the directory, its index or a shard is missing, damaged or not safetensors.
    """

    def __init__(self, path: str | Path, stem: str = "model") -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: expected a checkpoint directory, found {_describe(self.path)}")
        single, index = self.path / f"{stem}.safetensors", self.path / f"{stem}.safetensors.index.json"
        if index.is_file() and single.is_file():
            raise CheckpointError(
                f"{self.path}: holds both {single.name} and {index.name}; remove the one that is not meant"
            )
        if index.is_file():
            self.tensors = self._read_index(index)
        elif single.is_file():
            self.tensors = _read_header(single)
        else:
            raise CheckpointError(self._nothing_found(stem))
        if not self.tensors:
            raise CheckpointError(f"{self.path}: holds no tensors")

    def _nothing_found(self, stem: str) -> str:
        pickles = sorted({file.name for pattern in _PICKLES for file in self.path.glob(pattern)})
        if pickles:
            return (
                f"{self.path}: found {', '.join(pickles)}, but only safetensors are opened, since a pickle can run code; "
                "convert with `model.save_pretrained(...)` from a source you trust"
            )
        return f"{self.path}: no {stem}.safetensors and no {stem}.safetensors.index.json in it"

    def _read_index(self, index: Path) -> dict[str, TensorInfo]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index}: expected a `weight_map` of tensor names to files")
        found: dict[str, TensorInfo] = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: names the file {file!r}, expected a .safetensors file beside the index"
                )
            found.update(_read_header(self.path / file))
        wrong = [name for name, file in weight_map.items() if name not in found or found[name].file != file]
        extra = [name for name in found if name not in weight_map]
        if wrong or extra:
            raise CheckpointError(f"{index}: does not match its shards: {_some(wrong + extra)}")
        return found

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its storage dtype and shape, in memory of its own.

        Raises:
            CheckpointError: there is no such tensor, or the file has become shorter since it was opened.
        """
        info = self._info(name)
        return self._read(info, name, 0, info.nbytes).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows start … stop of a tensor's first axis, otherwise as `read`.

        Args:
            out: where to put them, contiguous, of the tensor's dtype and the rows' shape (default: new memory).
        """
        info = self._info(name)
        row = info.nbytes // max(1, info.shape[0])
        flat = None if out is None else out.view(-1)
        return self._read(info, name, start * row, (stop - start) * row, flat).reshape(stop - start, *info.shape[1:])

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: has no tensor {name}")
        return info

    def _read(
        self, info: TensorInfo, name: str, start: int, count: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = torch.empty(count // info.dtype.itemsize, dtype=info.dtype) if out is None else out
        view, done = _bytes(out), 0
        try:
            with open(self.path / info.file, "rb", buffering=0) as file:
                file.seek(info.offset + start)
                while done < count:
                    found = file.readinto(view[done:])
                    if not found:
                        raise CheckpointError(f"{self.path / info.file}: ends within {name}; copy the file again")
                    done += found
        except OSError as error:
            raise CheckpointError(f"{self.path / info.file}: cannot be read: {error.strerror}") from error
        return out


class Checkpoint(TensorDirectory):
    """A Hugging Face checkpoint directory: lazily read tensors, and its config.

    Raises:
        CheckpointError: as for `TensorDirectory`, or config.json is missing or not a JSON object.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        config = path / "config.json"
        if path.is_dir() and not config.is_file():
            raise CheckpointError(f"{path}: no config.json in it; expected a Hugging Face checkpoint directory")
        super().__init__(path)
        self.config: dict[str, Any] = read_json(config)


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 (hex) of a tensor's bytes in row-major order."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def checkpoint_digest(path: str | Path) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of every tensor of a checkpoint, and its config.

    Independent of how the tensors are spread over shards.
    """
    checkpoint = Checkpoint(path)
    total = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        total.update(f"{name}\0{info.dtype}\0{info.shape}\0{tensor_digest(checkpoint.read(name))}\n".encode())
    return total.hexdigest()


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


def copy_companions(source: Path, target: Path) -> None:
    """Carries tokenizer, chat template and generation settings from one checkpoint directory to another."""
    for name in COMPANIONS:
        if name == "tokenizer_config.json" and (source / name).is_file():
            write_json(target / name, without_paths(read_json(source / name)))
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def checkpoint_files(path: str | Path) -> list[Path]:
    """The files that make a checkpoint directory loadable: config, shards and their index, tokenizer, generation settings."""
    checkpoint = Checkpoint(path)
    shards = {info.file for info in checkpoint.tensors.values()}
    names = {"config.json", "model.safetensors.index.json", *COMPANIONS, *shards}
    return [file for name in sorted(names) if (file := checkpoint.path / name).is_file()]


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the entries that name where its owner keeps things: absolute paths, and `name_or_path`."""

    def path(value: Any) -> bool:
        return isinstance(value, str) and (value.startswith(("/", "~")) or value[1:3] == ":\\") and len(value) > 1

    return {key: value for key, value in config.items() if key.strip("_") != "name_or_path" and not path(value)}


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Places of all tensors of one safetensors file, after the library has found the file sound."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; expected the shard that the index names")
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _HEADER_LIMIT)))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
    if unknown:
        raise CheckpointError(
            f"{path}: holds tensors of dtype {', '.join(unknown)}, expected one of {', '.join(DTYPES)}; quantised "
            "checkpoints are not supported, use the original in bfloat16, float16 or float32"
        )
    return {
        name: TensorInfo(
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            path.name,
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


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


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().contiguous().cpu().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _describe(path: Path) -> str:
    return "a file" if path.is_file() else "nothing at that path"


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
