"""Checkpoint directories on disk: lazy reading, sharded writing, and nothing half-written.

The idea: the unit of exchange is a Hugging Face checkpoint directory (config.json, tokenizer, safetensors shards and their
index), so any training tool can read what we publish and produce what we accept. This is the only module that knows that
layout. Tensors are read one at a time with `pread` rather than through a memory map, so that resident memory is what the
caller holds and not the pages that happened to be touched; headers are validated by the safetensors library itself, which
is also the only format ever opened (a pickle can run code).

Writing needs every name, shape and dtype beforehand: the shards' headers are laid out first, so tensors may then arrive in
any order. The directories themselves appear whole or not at all (`files`).

Not covered: quantized number formats, and files other than safetensors.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mpunlearn.errors import CheckpointError
from mpunlearn.files import read_json

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
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_HEADER_LIMIT = 100_000_000


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


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as config.json writes it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


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
            f"{path}: holds tensors of dtype {', '.join(unknown)}, expected one of {', '.join(DTYPES)}; quantized "
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
