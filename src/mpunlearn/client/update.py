"""Writing the update: the trained minus the published weights, or the factors of the adapters.

All processes write in parallel, each of them whole files of one safetensors directory, so that no file has two writers
(network file systems do not promise what comes of that). The files hold tensors in order of name, as one process would
write them. Several processes make more and smaller files, but never smaller than servers accept. The tensors of a file are
gathered one at a time; while one process writes its tensor, the others write theirs.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpunlearn.checkpoint import Checkpoint, TensorWriter
from mpunlearn.client.weights import Trained, trained
from mpunlearn.errors import CheckpointError
from mpunlearn.files import write_json
from mpunlearn.lm.processes import full_tensor, is_main, new_directory_together, processes, rank
from mpunlearn.protocol.exchange import FACTORS, Card, UpdateManifest

MAX_FILE_BYTES = 5_000_000_000
"""No file gets larger, unless a single parameter is."""
BLOCK_BYTES = 1 << 26
"""About as many bytes of a tensor are computed at a time."""
MIN_FILE_BYTES = 2_000_000_000
"""Several processes do not make files for the sake of sharing the work if these would be smaller. Two files in a row are
together larger than this, so that files have half of it on average; a server does not accept less."""


@dataclass(frozen=True)
class _File:
    """A file of the update, and what it holds."""

    name: str
    parts: Sequence[Trained]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its tensors."""
        return {name: shape for part in self.parts for name, shape in part.shapes.items()}


def write_update(source: Checkpoint, model: Any, card: Card | None, dtype: torch.dtype, out: Path) -> None:
    """Writes the trained minus the published weights, or the LoRA factors. All processes must call this.

    Args:
        source: the published copy.
        model: the trained model.
        card: the copy's card, or None for an ordinary checkpoint.
        dtype: storage dtype of the update.
        out: a new directory.

    Raises:
        FileError: `out` cannot be written.
        CheckpointError: the update contains NaN or exceeds the range of the dtype.
    """
    files = _files(trained(model), dtype)
    for name in (name for file in files for name in file.shapes):
        weight = name.rsplit(".lora_", 1)[0] if name.endswith(FACTORS) else name
        if weight not in source.tensors:
            raise CheckpointError(
                f"{source.path}: damaged: the trained tensor {weight} is missing; copy the directory again"
            )
    with new_directory_together(out) as folder:
        tensors = _gathered(files)
        try:
            for name, of_file in itertools.groupby(tensors, key=lambda item: item[0].name):
                _write_file(name, of_file, source, dtype, folder, out)
        except Exception:
            for _ in tensors:  # the others need the rows that this process has
                pass
            raise
        if is_main():
            _write_index(files, dtype, folder)
            UpdateManifest(card).save(folder)


def _files(parts: Sequence[Trained], dtype: torch.dtype) -> list[_File]:
    """The files of the update. All processes plan the same."""
    parts = sorted(parts, key=lambda part: min(part.shapes))
    sizes = [dtype.itemsize * sum(map(math.prod, part.shapes.values())) for part in parts]
    share = max(MIN_FILE_BYTES, -(-sum(sizes) // processes()))
    limit = MAX_FILE_BYTES if processes() == 1 else min(MAX_FILE_BYTES, share)
    groups: list[list[Trained]] = [[]]
    filled = 0
    for part, size in zip(parts, sizes, strict=True):
        if filled and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += size
    if len(groups) == 1:
        return [_File("update", parts)]
    return [_File(f"update-{i:05d}-of-{len(groups):05d}", group) for i, group in enumerate(groups, start=1)]


def _gathered(files: Sequence[_File]) -> Iterator[tuple[_File, Trained, torch.Tensor]]:
    """The parameters of the files that this process writes, whole, float32, on the CPU. All processes must iterate.

    In turn, every process gets the next parameter of its file, so that all of them write at the same time.
    """
    for begin in range(0, len(files), processes()):
        together = files[begin : begin + processes()]
        for position in range(max(len(file.parts) for file in together)):
            mine = None
            for owner, file in enumerate(together):
                if position < len(file.parts):
                    part = file.parts[position]
                    whole = full_tensor(part.parameter.detach())
                    if owner == rank():
                        mine = (file, part, whole.cpu().float())
                    del whole
            if mine is not None:
                yield mine


def _write_file(
    name: str,
    tensors: Iterable[tuple[_File, Trained, torch.Tensor]],
    source: Checkpoint,
    dtype: torch.dtype,
    folder: Path,
    out: Path,
) -> None:
    """Writes one file of the update.

    Raises:
        CheckpointError: as for `write_update`.
    """
    with ExitStack() as stack:
        writer: TensorWriter | None = None
        for file, part, whole in tensors:
            if writer is None:
                specs = {tensor: (dtype, shape) for tensor, shape in file.shapes.items()}
                writer = stack.enter_context(TensorWriter(folder, specs, stem=name, max_shard_bytes=sys.maxsize))
            for tensor, value in part.convert(whole).items():
                _write_tensor(writer, tensor, value, source, dtype, out)


def _write_tensor(
    writer: TensorWriter, name: str, value: torch.Tensor, source: Checkpoint, dtype: torch.dtype, out: Path
) -> None:
    """Writes one tensor of the update, a block of rows at a time.

    Raises:
        CheckpointError: as for `write_update`.
    """
    size = max(1, BLOCK_BYTES // max(1, value[:1].nbytes))
    for start in range(0, len(value), size):
        rows = value[start : start + size]
        if not name.endswith(FACTORS):
            rows = rows - source.read_rows(name, start, start + len(rows)).float()
        cast = rows.to(dtype)
        if not bool(cast.isfinite().all()):
            raise CheckpointError(
                f"{out}: the update of {name} contains NaN or exceeds the range of {dtype}; use a smaller "
                "--learning-rate, or --update-dtype float32"
            )
        writer.write_rows(name, start, cast)


def _write_index(files: Sequence[_File], dtype: torch.dtype, folder: Path) -> None:
    """Writes the index of several files."""
    if len(files) == 1:
        return
    where = {name: f"{file.name}.safetensors" for file in files for name in file.shapes}
    total = dtype.itemsize * sum(math.prod(shape) for file in files for shape in file.shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: where[name] for name in sorted(where)}}
    write_json(folder / "update.safetensors.index.json", index)
