"""Computes the next model θ + η Δ̄ slice by slice, and validates the updates while reading them.

Δ̄ = Σ_k w_k T_k⁻¹(Δ'_k) is the weighted sum of the clients' updates Δ'_k of all copies k, each with its
reparameterization T_k inverted; w_k are the weights of the copy design, and η is the server step size.
"""

import dataclasses
import math
import secrets as system_entropy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, ShardWriter, copy_companions, plan_shards, tensor_digest, write_index
from mpunlearn.errors import CheckpointError, UnsupportedModelError, UpdateError
from mpunlearn.protocol.exchange import FACTORS, ReceivedUpdate, derived_config
from mpunlearn.server.keys import StreamKeys
from mpunlearn.server.offset import Offset, OffsetPart
from mpunlearn.server.publisher import Publisher, check_range, check_unchanged
from mpunlearn.server.secret import Secret, Streams
from mpunlearn.server.state import RoundRecord
from mpunlearn.server.stream import THREADS, RowSlice, chunks, compute_dtype, in_parallel, on_device, read, row_slices
from mpunlearn.server.updates import check_norm, check_tensors
from mpunlearn.server.workspace import Workspace
from mpunlearn.storage import Place, write_json

NORM_TOLERANCE = 1e-3
"""Relative tolerance between norms as computed by `examine` and by this module."""


def match(updates: Sequence[Place], run: str, record: RoundRecord, hashed: bool = False) -> list[ReceivedUpdate]:
    """Opens updates and sorts them by copy; `hashed` is for `TensorDirectory`.

    Raises:
        UpdateError: there is not exactly one update for each copy of the round.
    """
    copies = record.perturbation.copies
    by_copy: dict[int, ReceivedUpdate] = {}
    for path in updates:
        update = ReceivedUpdate.open(path, hashed)
        card = update.card
        if card.run != run or card.round != record.round or card.copies != copies:
            expected = f"a copy of {copies}, round {record.round}, run {run[:8]}"
            raise UpdateError(f"{path}: belongs to {card}; expected {expected}")
        if card.copy in by_copy:
            raise UpdateError(
                f"{path}: belongs to copy {card.copy}, and so does {by_copy[card.copy].tensors.place}; expected one "
                "update per copy"
            )
        by_copy[card.copy] = update
    if missing := [copy for copy in range(1, copies + 1) if copy not in by_copy]:
        raise UpdateError(
            f"no update for {'copy' if len(missing) == 1 else 'copies'} {', '.join(map(str, missing))} of round "
            f"{record.round}; all {copies} are needed, or the noise does not cancel"
        )
    return [by_copy[copy] for copy in sorted(by_copy)]


@dataclass(frozen=True)
class AggregatedShard:
    """One shard that was written."""

    sha256: str
    """SHA-256 of its file."""
    square: float
    """Squared norm of θ in it."""
    squares: list[float]
    """Squared norm of each update in it."""
    digests: dict[str, list[str]]
    """SHA-256 of each slice of each of its tensors."""


class Aggregation:
    """The aggregation of one round, one shard of the result at a time, as in `copies`.

    Args:
        source: θ, the model that the round was published from.
        record: the record of the round.
        secret: the run's secret, or the keys of the streams of the shards that will be written.
        offset: the offset of all copies.
        updates: one update per copy, in order.
        eta: server step size η.
        dtypes: storage dtype of each tensor of the result.
        max_shard_bytes: maximum size of a shard.
        device: device of the computation.

    Raises:
        UpdateError: an update does not match the model, or the updates change different tensors.
    """

    def __init__(
        self,
        source: Checkpoint,
        record: RoundRecord,
        secret: Streams,
        offset: Offset,
        updates: list[ReceivedUpdate],
        eta: float,
        dtypes: Mapping[str, torch.dtype],
        max_shard_bytes: int,
        device: torch.device,
        trained: set[str] | None = None,
    ) -> None:
        architecture = Architecture.of(source)
        self._source, self._record, self._secret, self._offset = source, record, secret, offset
        self._updates, self._eta, self._max_shard_bytes = updates, eta, max_shard_bytes
        self._publisher = Publisher(secret, record, architecture, device, offset)
        self._weights = [eta * float(weight) for weight in self._publisher.design.weights]
        self._roles = architecture.tensor_roles(source)
        self._specs = {name: (dtype, source.tensors[name].shape) for name, dtype in dtypes.items()}
        self.shards = plan_shards(self._specs, max_shard_bytes=max_shard_bytes)
        """The layout of the result."""
        self._trained = self._check_tensors(architecture) if trained is None else trained
        """Original names of the tensors that the updates change."""

    def write(self, folder: Place, number: int, threads: int = THREADS) -> AggregatedShard:
        """Writes a shard of θ + η Δ̄.

        Raises:
            StateError: θ has changed since the round was published.
            UpdateError: an update has NaN or infinite values.
        """
        shard, partial = self.shards[number], ""
        if isinstance(folder, Path):
            partial = f".{shard.file}.{system_entropy.token_hex(8)}"
        with ShardWriter(folder, shard, partial) as writer:

            def work(rows: RowSlice, workspace: Workspace) -> tuple[float, list[float], str]:
                value, square, squares = self._slice(rows, workspace)
                dtype = self._specs[rows.name][0]
                cast = value if value.dtype == dtype else workspace.copy(value, dtype)
                check_range(cast, value, rows.name)
                writer.write_rows(rows.name, rows.start, cast)
                return square, squares, tensor_digest(cast)

            slices = row_slices(self._source, {name: self._roles[name] for name in sorted(shard.tensors)})
            of = f", shard {number + 1} of {len(self.shards)}" if len(self.shards) > 1 else ""
            what = f"round {self._record.round}: aggregating {len(self._updates)} updates{of}"
            results = in_parallel(slices, work, what, len, threads)
        if isinstance(folder, Path):
            (folder / partial).rename(folder / shard.file)
        digests: dict[str, list[str]] = {}
        for rows, (*_, digest) in zip(slices, results, strict=True):
            digests.setdefault(rows.name, []).append(digest)
        squares = [sum(values[copy] for _, values, _ in results) for copy in range(len(self._updates))]
        return AggregatedShard(writer.sha256, sum(square for square, *_ in results), squares, digests)

    def finish(self, folder: Place, written: Sequence[AggregatedShard]) -> dict[str, list[str]]:
        """Checks the updates and writes the files beside the shards, once all shards are there.

        Returns:
            SHA-256 of each slice of each tensor of the result.

        Raises:
            UpdateError: an update is larger than the model.
        """
        for copy, update in enumerate(self._updates):
            norm = sum(shard.squares[copy] for shard in written)
            check_norm(update.tensors.place, norm, sum(shard.square for shard in written), NORM_TOLERANCE)
        if isinstance(folder, Path):
            for left in folder.glob(".*"):  # of a worker that was killed
                left.unlink()
        copy_companions(self._source.place, folder)
        write_index(folder, self.shards)
        write_json(folder / "config.json", derived_config(self._source.config, self._specs))
        return {name: digests for shard in written for name, digests in shard.digests.items()}

    def task(self, folder: Place, number: int) -> "AggregationTask":
        """All that a worker on another machine needs to write a shard; of keys, those of the streams of the shard."""
        assert isinstance(self._secret, Secret)
        names = {name: self._roles[name] for name in self.shards[number].tensors}
        digests = {name: self._record.digests[name] for name in names}
        return AggregationTask(
            self._source.place.resolve(),
            dataclasses.replace(self._record, digests=digests, rounding={}),
            StreamKeys.of(self._secret, self._publisher.streams(names)),
            self._offset.part(names),
            [update.tensors.place.resolve() for update in self._updates],
            self._eta,
            {name: dtype for name, (dtype, _) in self._specs.items()},
            self._max_shard_bytes,
            str(self._publisher.device),
            self._trained & set(names),
            folder.resolve(),
            number,
        )

    def _slice(self, rows: RowSlice, workspace: Workspace) -> tuple[torch.Tensor, float, list[float]]:
        """Returns θ + η Δ̄ for a slice, in the compute dtype, and the slice's squared norms of θ and of each update."""
        stored = read(self._source, rows.name, rows, workspace)
        check_unchanged(self._source, self._record, rows, stored)
        value = workspace.copy(stored, compute_dtype(stored.dtype), self._publisher.device)
        square, squares = _square(value), [0.0] * len(self._updates)
        if rows.name in self._trained:
            for copy in range(len(self._updates)):
                with workspace.frame():
                    squares[copy] = self._add(value, copy, rows, stored, workspace)
        return value, square, squares

    def _add(self, value: torch.Tensor, copy: int, rows: RowSlice, stored: torch.Tensor, workspace: Workspace) -> float:
        """Adds η w_k T_k⁻¹(Δ'_k) to `value`; returns the squared norm of Δ'_k."""
        received = self._updates[copy]
        name = self._publisher.maps[copy].published_name(rows.name, rows.role)
        if name + FACTORS[0] in received.tensors.tensors:
            return self._add_product(value, copy, rows, name, workspace)
        update = on_device(read(received.tensors, name, rows, workspace), value.device, workspace)
        if received.weights:
            published = self._publisher.publish(rows, stored, workspace, [copy]).rows[0]
            update = update.to(value.dtype) - published.to(value.dtype)
        maps = self._publisher.maps[copy].maps(rows.role)
        square = 0.0
        for start, stop in chunks(len(value), value.numel() // max(1, len(value)), maps[0].block, value.device):
            with workspace.frame():
                delta = workspace.empty(tuple(value[start:stop].shape), value.dtype, value.device)
                delta.copy_(maps[0].gather(update, start, stop))
                square += _square(delta)
                for axis, axis_map in list(enumerate(maps))[1:]:
                    delta = axis_map.rearrange(delta, axis)
                for axis, axis_map in enumerate(maps):
                    delta = axis_map.rotate(delta, axis, start if axis == 0 else 0, transpose=True)
                value[start:stop].add_(delta, alpha=self._weights[copy])
        return self._finite(square, name, copy)

    def _add_product(self, value: torch.Tensor, copy: int, rows: RowSlice, name: str, workspace: Workspace) -> float:
        """`_add` for LoRA factors: T⁻¹(B A) = (L_out⁻¹ B)(A L_in), with the product computed one chunk at a time."""
        tensors = self._updates[copy].tensors
        a, b = (tensors.read(name + factor).to(value.device, value.dtype) for factor in FACTORS)
        outputs, inputs = self._publisher.maps[copy].maps(rows.role)
        a, b = inputs.invert(a, 1), outputs.invert(b, 0)[rows.start : rows.stop]
        square = 0.0
        for start, stop in chunks(value.shape[0], value.shape[1], 1, value.device):
            with workspace.frame():
                delta = workspace.empty(tuple(value[start:stop].shape), value.dtype, value.device)
                torch.mm(b[start:stop], a, out=delta)
                square += _square(delta)
                value[start:stop].add_(delta, alpha=self._weights[copy])
        return self._finite(square, name, copy)

    def _finite(self, square: float, name: str, copy: int) -> float:
        if not math.isfinite(square):
            path = self._updates[copy].tensors.place
            raise UpdateError(f"{path}: {name} contains NaN or infinite values; train copy {copy + 1} again")
        return square

    def _check_tensors(self, architecture: Architecture) -> set[str]:
        """Checks names, shapes and dtypes of all updates; returns the original names of the changed tensors."""
        names: list[set[str]] = []
        for copy, update in enumerate(self._updates):
            maps = self._publisher.maps[copy]
            originals = {maps.published_name(name, role): name for name, role in self._roles.items()}
            specs = {
                published: (self._publisher.dtype(name), self._source.tensors[name].shape)
                for published, name in originals.items()
            }
            counted = None
            if update.trained is not None:
                try:
                    counted = set(architecture.tensor_roles(update.trained))
                except (UnsupportedModelError, CheckpointError) as error:
                    raise UpdateError(f"not a model that was trained from a published copy: {error}") from error
            names.append({originals[name] for name in check_tensors(update, specs, counted)})
        for update, changed in zip(self._updates[1:], names[1:], strict=True):
            if difference := sorted(changed ^ names[0]):
                raise UpdateError(
                    f"{update.tensors.place} and {self._updates[0].tensors.place} update different tensors, first "
                    f"{difference[0]}; train all copies alike, or the noise does not cancel"
                )
        return names[0]


@dataclass(frozen=True)
class AggregationTask:
    """One shard of the result, to be written by any process that can reach θ, the updates and the result's directory."""

    source: Place
    record: RoundRecord
    keys: StreamKeys
    offset: OffsetPart
    updates: list[Place]
    eta: float
    dtypes: dict[str, torch.dtype]
    max_shard_bytes: int
    device: str
    trained: set[str]
    folder: Place
    number: int

    def __call__(self) -> AggregatedShard:
        """Writes the shard, on one thread."""
        aggregation = Aggregation(
            Checkpoint(self.source),
            self.record,
            self.keys,
            self.offset.open(),
            [ReceivedUpdate.open(update) for update in self.updates],
            self.eta,
            self.dtypes,
            self.max_shard_bytes,
            torch.device(self.device),
            self.trained,
        )
        return aggregation.write(self.folder, self.number, threads=1)


def _square(value: torch.Tensor) -> float:
    flat = value.flatten()
    return sum(float(torch.dot(flat[a:b], flat[a:b])) for a, b in chunks(flat.numel(), 1, 1, value.device))
