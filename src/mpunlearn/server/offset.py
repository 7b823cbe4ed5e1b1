"""The secret offset c: copies are made of a stand-in θ + c instead of the model θ, and updates are applied to θ.

    θ_k = T_k(θ + c + ε_k),    θ ← θ + η Δ̄

The idea: the noise ε_k cancels over the copies of a round, for the server and also for a client that holds all of them.
An offset that is the same in all copies, rounds and runs never cancels for the client, and the server need not cancel
it, because it adds the updates to θ. However many copies a client averages, it is left with an error of ‖c‖/‖θ‖, the
*floor*. The price is that the client unlearns on a slightly different model.

The offset has up to two parts. *Common noise* is drawn from the key of a `Lineage`, slice by slice like all noise. A
*stand-in checkpoint* is a model of the same shapes that the server made in any way; its part is the checkpoint minus
the model of the first round.

The standard deviation of common noise is κ_c times the RMS of the weights, per block. With the shape `whitened`, the
noise of a linear layer is Z M, where Z is standard normal, M ∝ (Σ/λ + δ)^(-1/2), Σ is the second moment of the layer's
inputs on calibration text, λ its largest eigenvalue, and δ = `DAMPING`. Inputs in the directions that occur most are
then hardly disturbed, so that the function of the model changes less at the same distance between the parameters. For
the embedding, Σ is the second moment of the loss's gradient at its output; if the LM head shares it, plus that of the
head's input (each divided by its largest eigenvalue).

Not covered: attackers who know something about θ itself, such as its public base or that its weight matrices have a few
large singular values; they can do better than the floor. Nor how much of the function a copy still has: a stand-in that
is close in function is a working model.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from mpunlearn.architecture import Architecture, TensorRole
from mpunlearn.checkpoint import Checkpoint, TensorDirectory, TensorWriter, copy_companions, tensor_digest
from mpunlearn.errors import StateError
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import derived_config
from mpunlearn.server.keys import StreamKeys
from mpunlearn.server.secret import Secret, Streams
from mpunlearn.server.stream import RowSlice, chunks, compute_dtype, in_parallel, read, row_slices
from mpunlearn.server.workspace import Workspace

DAMPING = 1e-3
"""δ: directions with less than about this share of the largest second moment are not favored any further."""
CACHED = 8
"""Number of inputs whose matrices are kept in memory; the threads work on tensors that are close to one another."""
Shape = Literal["whitened", "gauss"]


@dataclass(frozen=True)
class CommonNoise:
    """The pinned levels of a lineage's common noise."""

    level: float
    """κ_c."""
    shape: Shape
    sigma: dict[str, float]
    """Standard deviation of the common noise in each tensor, in units of the weights."""
    floor: float
    """Expected ‖c‖/‖θ‖ of the common noise."""


@dataclass(frozen=True)
class StandIn:
    """A stand-in checkpoint, as recorded in the server's state."""

    path: str
    origin: str
    """Path of the model of the first round, from which the offset is measured."""
    digest: str
    """SHA-256 over the tensors of both."""
    distance: float
    """‖stand-in - origin‖/‖origin‖."""


@dataclass(frozen=True)
class OffsetRecord:
    """What the offset of a run consists of, as recorded in the server's state."""

    lineage: str | None = None
    """Directory of the lineage; None without common noise."""
    common: CommonNoise | None = None
    stand_in: StandIn | None = None

    @property
    def floor(self) -> float:
        """‖c‖/‖θ‖: the error that is left to a client that averages all copies of all rounds.

        The two parts are independent, so their squares add up.
        """
        common = self.common.floor if self.common else 0.0
        return math.hypot(common, self.stand_in.distance if self.stand_in else 0.0)


class Whitening:
    """The matrices M that shape the common noise of linear layers, by tensor name.

    M = s (I + U diag(f) Uᵀ) is stored as `values` f, shape (r,), and `vectors` U, shape (inputs, r), both float32, for
    the r directions that differ from the rest. The scale s makes the rows of Z M have the variance of those of Z.

    Args:
        inputs: for each tensor, the index of its input; several tensors can share one.
        source: the directory that holds `vectors` and `values` of every input, or these tensors by name; a directory is
            not read if there are no inputs.
    """

    def __init__(self, inputs: Mapping[str, int], source: Path | Mapping[str, torch.Tensor]) -> None:
        self._inputs = dict(inputs)
        self._source = TensorDirectory(source) if isinstance(source, Path) and self._inputs else source
        self._matrices = lru_cache(CACHED)(self._read)

    def only(self, names: Collection[str]) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """The arguments of a `Whitening` for some tensors, without the directory."""
        inputs = {name: self._inputs[name] for name in names if name in self._inputs}
        parts = (f"{number}.{part}" for number in set(inputs.values()) for part in ("vectors", "values"))
        return inputs, {part: self._tensor(part) for part in parts}

    def __contains__(self, name: str) -> bool:
        return name in self._inputs

    def apply(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """Z M for some rows of Z, shape (rows, inputs), in the dtype of `rows`."""
        vectors, values, scale = self._matrices(self._inputs[name], rows.dtype, rows.device)
        return (rows + (rows @ vectors * values) @ vectors.T).mul_(scale)

    def _tensor(self, name: str) -> torch.Tensor:
        source = self._source
        assert not isinstance(source, Path)
        return source.read(name) if isinstance(source, TensorDirectory) else source[name]

    def _read(self, number: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, float]:
        vectors, values = (self._tensor(f"{number}.{part}").to(device, dtype) for part in ("vectors", "values"))
        gains = float((1 + values).square().sum()) + (len(vectors) - len(values))
        return vectors, values, math.sqrt(len(vectors) / gains)


class Offset:
    """Adds c to slices of θ.

    Args:
        record: what the offset consists of; None for no offset.
        secret: the lineage's key, if there is common noise.
        whitening: the lineage's matrices.
    """

    def __init__(
        self, record: OffsetRecord | None, secret: Streams | None = None, whitening: Whitening | None = None
    ) -> None:
        self.record = record or OffsetRecord()
        self._secret, self._whitening = secret, whitening or Whitening({}, {})
        stand_in = self.record.stand_in
        self._stand_in = (Checkpoint(stand_in.path), Checkpoint(stand_in.origin)) if stand_in else None

    def part(self, names: Collection[str]) -> "OffsetPart":
        """What the offset of some tensors is computed from, without the lineage's key."""
        common = self.record.common
        if common is None or not isinstance(self._secret, Secret):
            return OffsetPart(self.record, StreamKeys({}), {}, {})
        streams = [common_stream(name) for name in names if common.sigma[name]]
        return OffsetPart(self.record, StreamKeys.of(self._secret, streams), *self._whitening.only(names))

    def __bool__(self) -> bool:
        return self.record.common is not None or self._stand_in is not None

    def mixes(self, name: str) -> bool:
        """Whether the noise of a tensor is a product of matrices."""
        common = self.record.common
        return common is not None and common.shape == "whitened" and name in self._whitening

    def add(self, value: torch.Tensor, rows: RowSlice, start: int, workspace: Workspace) -> None:
        """Adds c to `value`, in place.

        Args:
            value: consecutive rows of a slice of θ, float32 or float64.
            rows: the slice.
            start: the first of these rows, counted from the beginning of the slice.
            workspace: memory for intermediate results.
        """
        first, count = rows.start + start, len(value)
        if self._stand_in is not None:
            for source, sign in zip(self._stand_in, (1, -1), strict=True):
                part = RowSlice(rows.name, rows.role, first, first + count)
                value.add_(
                    workspace.copy(read(source, rows.name, part, workspace), value.dtype, value.device), alpha=sign
                )
        common = self.record.common
        if common is None or not common.sigma[rows.name]:
            return
        assert self._secret is not None
        noise = workspace.empty(tuple(value.shape), value.dtype, value.device)
        stream = self._secret.stream(*common_stream(rows.name))
        stream.normals(value.numel(), first * (value.numel() // count), out=noise.view(-1), workspace=workspace)
        if self.mixes(rows.name):
            noise = self._whitening.apply(noise, rows.name)
        value.add_(noise, alpha=common.sigma[rows.name])


@dataclass(frozen=True)
class OffsetPart:
    """The offset of some tensors, for a worker on another machine, which has no access to the lineage."""

    record: OffsetRecord
    keys: StreamKeys
    inputs: dict[str, int]
    """The arguments of a `Whitening`."""
    matrices: dict[str, torch.Tensor]

    def open(self) -> Offset:
        """The offset of these tensors."""
        return Offset(self.record, self.keys, Whitening(self.inputs, self.matrices))


def common_stream(name: str) -> tuple[str, str]:
    """The name of the stream of a tensor's common noise."""
    return "common noise", name


def open_stand_in(path: Path, origin: Checkpoint, roles: Mapping[str, TensorRole]) -> StandIn:
    """Compares a stand-in with the model of the first round.

    Args:
        path: the stand-in, a checkpoint directory.
        origin: the model.
        roles: the tensors of the model.

    Raises:
        StateError: the stand-in has other tensors or shapes, contains NaN or infinite weights, or equals the model.
        CheckpointError: it cannot be read.
    """
    stand_in = Checkpoint(path)
    for name in roles:
        expected = origin.tensors[name].shape
        actual = stand_in.tensors[name].shape if name in stand_in.tensors else None
        if actual != expected:
            raise StateError(
                f"--stand-in {path}: {name} has shape {list(actual) if actual else None}, expected {list(expected)} as "
                f"in {origin.path}; a stand-in needs the same shapes"
            )

    def work(rows: RowSlice, workspace: Workspace) -> tuple[float, float, str]:
        stored, other = (read(source, rows.name, rows, workspace) for source in (origin, stand_in))
        value = workspace.copy(stored, compute_dtype(stored.dtype))
        difference = workspace.copy(other, value.dtype).sub_(value)
        squares = (float(tensor.square().sum(dtype=torch.float64)) for tensor in (difference, value))
        return (*squares, tensor_digest(stored) + tensor_digest(other))  # type: ignore[return-value]

    results = in_parallel(row_slices(origin, roles), work, "comparing the stand-in with the model", len)
    squares = [sum(result[part] for result in results) for part in (0, 1)]  # type: ignore[misc]
    if not math.isfinite(squares[0]):
        raise StateError(f"--stand-in {path}: contains NaN or infinite weights")
    if squares[0] == 0:
        raise StateError(f"--stand-in {path}: equals {origin.path}, so it would hide nothing; leave the option out")
    joined = bytearray("".join(digest for *_, digest in results).encode())
    digest = tensor_digest(torch.frombuffer(joined, dtype=torch.uint8))
    return StandIn(str(path.resolve()), str(origin.path.resolve()), digest, math.sqrt(squares[0] / squares[1]))


def write_stand_in(source: Checkpoint, offset: Offset, out: Path) -> Path:
    """Writes θ + c as a checkpoint, in the dtypes of θ, to measure what the offset does to the function.

    The result is as secret as θ.

    Raises:
        FileError: `out` exists or cannot be written.
    """
    roles = Architecture.of(source).tensor_roles(source)
    specs = {name: (source.tensors[name].dtype, source.tensors[name].shape) for name in roles}
    with new_directory(out, mode=0o700) as folder:
        copy_companions(source.path, folder)
        write_json(folder / "config.json", derived_config(source.config, specs))
        with TensorWriter(folder, specs) as writer:

            def work(rows: RowSlice, workspace: Workspace) -> None:
                stored = read(source, rows.name, rows, workspace)
                value = workspace.copy(stored, compute_dtype(stored.dtype))
                entries = value.numel() // max(1, len(value))
                for start, stop in chunks(len(value), entries, 1):
                    with workspace.frame():
                        offset.add(value[start:stop], rows, start, workspace)
                writer.write_rows(rows.name, rows.start, value.to(stored.dtype))

            in_parallel(row_slices(source, roles), work, "writing the stand-in", len)
    return out
