"""Reading checkpoint directories: safetensors files, one tensor at a time.

Server and client exchange Hugging Face checkpoint directories (config.json, tokenizer, safetensors shards and their
index), so any training tool can read what the server publishes and produce what it accepts.

Tensors are read with plain file reads rather than through a memory map, so that resident memory is what the caller
holds and not the pages that happened to be touched. The safetensors library validates every header. No other format is
ever opened, since a pickle file can run code.

A directory can also be in an object store. Its tensors are then read by ranges, without a local copy (see `storage`).

Not covered: quantized number formats, and shards in a different directory than their index.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from mpunlearn.checkpoint.header import TensorInfo, read_header
from mpunlearn.checkpoint.ordered import FileHasher
from mpunlearn.errors import CheckpointError, FileError
from mpunlearn.storage import Place, StorePath, read_json, size_of

FLOAT_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""The storage dtypes that options accept."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
"""Endings of the names of files of checkpoints in other formats, for the error message."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class TensorDirectory:
    """The tensors in a directory of safetensors files, read lazily.

    Args:
        path: a directory with `STEM.safetensors`, or with `STEM.safetensors.index.json` and the shards that it lists.
        stem: "model" for checkpoints, "update" for updates.
        hashed: whether to compute the SHA-256 of the files while they are read, for `digests`.

    Raises:
        CheckpointError: the directory, its index or a shard is missing, damaged or not safetensors.
    """

    def __init__(self, path: str | Place, stem: str = "model", hashed: bool = False) -> None:
        self.place = path if isinstance(path, StorePath) else Path(path)
        """The directory, on the disk or in a store."""
        self._hashers: dict[str, FileHasher] = {}
        if not self.place.is_dir():
            raise CheckpointError(f"{self.place}: expected a checkpoint directory, found {_found_instead(self.place)}")
        single, index = self.place / f"{stem}.safetensors", self.place / f"{stem}.safetensors.index.json"
        self.tensors: dict[str, TensorInfo]
        """Every tensor, by name."""
        if index.is_file() and single.is_file():
            raise CheckpointError(
                f"{self.place}: contains both {single.name} and {index.name}; remove the one that does not belong there"
            )
        if index.is_file():
            self.tensors = self._read_index(index)
        elif single.is_file():
            self.tensors = read_header(single)
        else:
            raise CheckpointError(f"{self.place}: {self._without_safetensors(stem)}")
        if not self.tensors:
            raise CheckpointError(f"{self.place}: contains no tensors")
        if hashed:
            for file in sorted({info.file for info in self.tensors.values()}):
                self._hashers[file] = FileHasher(self.place / file, size_of(self.place / file))

    @property
    def path(self) -> Path:
        """The directory, for those who need one on the disk.

        Raises:
            CheckpointError: it is in a store.
        """
        if isinstance(self.place, StorePath):
            raise CheckpointError(f"{self.place}: expected a directory on this machine; download it first")
        return self.place

    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of each file of tensors, if the directory was opened with `hashed`; reads what was not read yet."""
        return {file: hasher.hexdigest() for file, hasher in self._hashers.items()}

    def _without_safetensors(self, stem: str) -> str:
        """Says what is wrong with a directory without safetensors files, for an error message."""
        pickles = sorted(file.name for file in self.place.iterdir() if file.name.endswith(_PICKLES))
        if pickles:
            return (
                f"contains {', '.join(pickles)}, but only safetensors files are opened, since a pickle can run code; if "
                "you trust its source, load the model and save it again with `model.save_pretrained(...)`"
            )
        return f"expected {stem}.safetensors or {stem}.safetensors.index.json in this directory, found neither"

    def _read_index(self, index: Place) -> dict[str, TensorInfo]:
        """The tensors of the shards that an index lists."""
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index}: expected a `weight_map` that names the file of every tensor, found none")
        tensors: dict[str, TensorInfo] = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: names the file {file!r:.80}, expected a .safetensors file in the same directory"
                )
            tensors.update(read_header(self.place / file))
        misplaced = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file != file]
        unlisted = [name for name in tensors if name not in weight_map]
        if misplaced or unlisted:
            raise CheckpointError(
                f"{index}: does not match its shards in {listed(misplaced + unlisted)}; copy the checkpoint again"
            )
        return tensors

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor in its storage dtype and shape into newly allocated CPU memory.

        Raises:
            CheckpointError: there is no such tensor, or the file was truncated after its header was read.
        """
        info = self._info(name)
        return self._read(info, name, 0, info.nbytes).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Reads part of a tensor: the rows `start` to `stop` (exclusive) of its first axis.

        Args:
            name: name of the tensor.
            start: first row.
            stop: end of the rows, exclusive.
            out: contiguous tensor to read into, with the tensor's dtype and the rows' shape (default: a new tensor).

        Raises:
            CheckpointError: as for `read`.
        """
        info = self._info(name)
        row = info.nbytes // max(1, info.shape[0])
        flat = None if out is None else out.view(-1)
        return self._read(info, name, start * row, (stop - start) * row, flat).reshape(stop - start, *info.shape[1:])

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.place}: has no tensor {name}")
        return info

    def _read(
        self, info: TensorInfo, name: str, start: int, count: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Reads `count` bytes of a tensor, starting at its byte `start`, into `out` or a new tensor."""
        out = torch.empty(count // info.dtype.itemsize, dtype=info.dtype) if out is None else out
        view, first = tensor_bytes(out), info.offset + start
        if isinstance(self.place, StorePath):
            part = (self.place / info.file).read_range(first, first + count)
            if len(part) != count:
                raise CheckpointError(f"{self.place / info.file}: ends within {name}; upload the file again")
            view[:] = part
        else:
            self._read_into(view, self.place / info.file, first, name)
        if info.file in self._hashers:
            self._hashers[info.file].add(first, view)
        return out

    def _read_into(self, view: memoryview, path: Path, start: int, name: str) -> None:
        """Fills `view` with the bytes of a file on the disk that begin at `start`."""
        done = 0
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                while done < len(view):
                    received = file.readinto(view[done:])
                    if not received:
                        raise CheckpointError(f"{path}: ends within {name}; copy the file again")
                    done += received
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


class Checkpoint(TensorDirectory):
    """A Hugging Face checkpoint directory: its tensors, read lazily, and its config.

    Args:
        path: the directory, on this machine or in a store. It is never a model name on the Hugging Face Hub.
        hashed: as for `TensorDirectory`.

    Raises:
        CheckpointError: as for `TensorDirectory`, or config.json is missing or not a JSON object.
    """

    def __init__(self, path: str | Place, hashed: bool = False) -> None:
        path = path if isinstance(path, StorePath) else Path(path)
        config = path / "config.json"
        if path.is_dir() and not config.is_file():
            raise CheckpointError(f"{path}: expected a Hugging Face checkpoint directory, found no config.json in it")
        super().__init__(path, hashed=hashed)
        self.config: dict[str, Any] = _read_json(config)
        """The content of config.json."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as config.json writes it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 (hex) of a tensor's bytes in row-major order."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def checkpoint_digest(path: str | Path) -> str:
    """SHA-256 (hex) over the names, dtypes, shapes and bytes of all tensors of a checkpoint, and its config.

    It does not depend on how the tensors are split into shards.

    Raises:
        CheckpointError: it is not a checkpoint directory.
    """
    checkpoint = Checkpoint(path)
    total = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        total.update(f"{name}\0{info.dtype}\0{info.shape}\0{tensor_digest(checkpoint.read(name))}\n".encode())
    return total.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a view of its memory if it is contiguous and on the CPU."""
    flat = tensor.detach().contiguous().cpu().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def listed(names: list[str], limit: int = 5) -> str:
    """The first names of a list and the number of remaining ones, for error messages."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _read_json(path: Place) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileError as error:
        raise CheckpointError(str(error)) from error


def _found_instead(path: Place) -> str:
    """What is at a path where a checkpoint directory should be, for an error message."""
    if isinstance(path, StorePath):
        return "no files there"
    if path.exists():
        return "a file"
    if _HUB_NAME.fullmatch(str(path)):
        return (
            "nothing at that path; models are not downloaded, so for a model on the Hugging Face Hub run "
            f"`hf download {path} --local-dir DIR` and give DIR instead"
        )
    return "nothing at that path"
