"""The headers of safetensors files: what tensors a file has, and where.

The safetensors library validates the header of every local file. It cannot read a range of a file in a store, so for those
the same is checked here: that the tensors fill the file, one after the other.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mpunlearn.errors import CheckpointError
from mpunlearn.storage import Place, StorePath, read_part, size_of

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
"""The supported dtypes, by their safetensors codes. Others (fp8, packed formats) are rejected."""
_MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is stored on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    """Name of its file in the directory."""
    offset: int
    """Start of its data, in bytes from the start of the file."""
    nbytes: int
    """Size of its data, in bytes."""


def read_header(path: Place) -> dict[str, TensorInfo]:
    """All tensors of one safetensors file, after the safetensors library has validated its header."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, although the index lists this shard; copy the checkpoint again")
        text = _header_of(path)
        length, header = len(text), json.loads(text)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}); copy it again") from error
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
    if unknown:
        raise CheckpointError(
            f"{path}: contains tensors of dtype {', '.join(unknown)}, expected one of {', '.join(DTYPES)}; quantized "
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


def _header_of(path: Place) -> bytes:
    """The validated header of a safetensors file.

    Raises:
        SafetensorError: the file is not as long as its header says, or the header is not valid.
        ValueError: likewise.
    """
    if isinstance(path, Path):
        with safe_open(path, framework="pt"):
            pass
    size = size_of(path)
    (length,) = struct.unpack("<Q", read_part(path, 0, min(8, size)).ljust(8, b"\0"))
    if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError("its header does not fit into the file")
    text = read_part(path, 8, 8 + length)
    if isinstance(path, StorePath):
        _check_header(text, size - 8 - length)
    return text


def _check_header(text: bytes, size: int) -> None:
    """Checks that the tensors of a header fill `size` bytes without gaps, as the library checks it for a local file."""
    end = 0
    entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
    for entry in sorted(entries, key=lambda entry: entry["data_offsets"]):
        start, stop = entry["data_offsets"]
        width = DTYPES[entry["dtype"]].itemsize if entry["dtype"] in DTYPES else 0
        if start != end or (width and stop - start != width * math.prod(entry["shape"])):
            raise ValueError("its tensors do not follow one another")
        end = stop
    if end != size:
        raise ValueError(f"it has {size} bytes of tensors, and its header says {end}")
