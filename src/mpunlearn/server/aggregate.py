"""Computes θ + η Δ̄, slice by slice, from updates that are checked on the way."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, TensorWriter, copy_companions, tensor_digest
from mpunlearn.errors import CheckpointError, StateError, UnsupportedModelError, UpdateError
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import FACTORS, ReceivedUpdate, derived_config
from mpunlearn.server.publisher import Publisher, checked_cast
from mpunlearn.server.state import RoundRecord
from mpunlearn.server.stream import RowSlice, chunks, compute_dtype, in_parallel, on_device, read, row_slices
from mpunlearn.server.updates import Specs, check_norm, check_tensors
from mpunlearn.server.workspace import Workspace

NORM_TOLERANCE = 1e-3
"""Relative difference between norms as `examine` and as this module sum them up."""


def match(updates: Sequence[str | Path], run: str, record: RoundRecord) -> list[ReceivedUpdate]:
    """Opens updates and puts them in the order of their copies.

    Raises:
        UpdateError: there is not exactly one for each copy of the round.
    """
    copies = record.perturbation.copies
    by_copy: dict[int, ReceivedUpdate] = {}
    for path in updates:
        update = ReceivedUpdate.open(path)
        card = update.card
        if card.run != run or card.round != record.round or card.copies != copies:
            raise UpdateError(f"{path}: is of {card}; expected a copy of {copies}, round {record.round}, run {run[:8]}")
        if card.copy in by_copy:
            raise UpdateError(
                f"{path}: is of copy {card.copy}, and so is {by_copy[card.copy].tensors.path}; give each copy's update once"
            )
        by_copy[card.copy] = update
    if missing := [copy for copy in range(1, copies + 1) if copy not in by_copy]:
        raise UpdateError(
            f"no update of {'copy' if len(missing) == 1 else 'copies'} {', '.join(map(str, missing))} of round "
            f"{record.round}; the noise cancels only over all {copies} copies"
        )
    return [by_copy[copy] for copy in sorted(by_copy)]


class Aggregation:
    """The aggregation of one round.

    Args:
        source: θ.
        record: the round.
        architecture: the model's.
        publisher: the round's.
        updates: one per copy, in order.
        eta: server step size η.

    Raises:
        UpdateError: an update is not of this model, or the updates are not of the same tensors.
    """

    def __init__(
        self,
        source: Checkpoint,
        record: RoundRecord,
        architecture: Architecture,
        publisher: Publisher,
        updates: list[ReceivedUpdate],
        eta: float,
    ) -> None:
        self._source, self._record, self._publisher, self._updates = source, record, publisher, updates
        self._weights = [eta * float(weight) for weight in publisher.design.weights]
        self._roles = architecture.tensor_roles(source)
        self._trained = self._check_tensors(architecture)
        """Names of the tensors that the updates change."""

    def write(self, out: Path, specs: Specs) -> None:
        """Writes θ + η Δ̄ into a new directory.

        Args:
            out: the directory.
            specs: dtype and shape of every tensor of the result.

        Raises:
            StateError: θ is not what the round was published from.
            UpdateError: an update holds NaN or infinite values, or is larger than the model.
            FileError: `out` cannot be written.
        """
        with new_directory(out, mode=0o700) as folder:
            copy_companions(self._source.path, folder)
            write_json(folder / "config.json", derived_config(self._source.config, specs))
            with TensorWriter(folder, specs) as writer:

                def work(item: tuple[int, RowSlice], workspace: Workspace) -> tuple[float, list[float]]:
                    number, rows = item
                    value, square, squares = self._slice(number, rows, workspace)
                    dtype = specs[rows.name][0]
                    cast = workspace.empty(tuple(value.shape), dtype, value.device)
                    writer.write_rows(rows.name, rows.start, checked_cast(value, rows.name, cast))
                    return square, squares

                slices = _numbered(row_slices(self._source, self._roles))
                what = f"round {self._record.round}: aggregating {len(self._updates)} updates"
                results = in_parallel(slices, work, what, lambda item: len(item[1]))
            of_model = sum(square for square, _ in results)
            for copy, update in enumerate(self._updates):
                check_norm(update.tensors.path, sum(squares[copy] for _, squares in results), of_model, NORM_TOLERANCE)

    def _slice(self, number: int, rows: RowSlice, workspace: Workspace) -> tuple[torch.Tensor, float, list[float]]:
        """θ + η Δ̄ of a slice in arithmetic dtype, and the squared norms of θ and of each update there."""
        stored = read(self._source, rows.name, rows, workspace)
        if tensor_digest(stored) != self._record.digests[rows.name][number]:
            raise StateError(
                f"{self._source.path}: {rows.name} is not what round {self._record.round} was published from; restore that "
                "checkpoint, or say with --checkpoint where it is now"
            )
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
        if received.trained is not None:
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
        """`_add` for an update that came as factors: T⁻¹(B A) = (L_out⁻¹ B)(A L_in), multiplied out a chunk at a time."""
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
            path = self._updates[copy].tensors.path
            raise UpdateError(f"{path}: {name} holds NaN or infinite values; train copy {copy + 1} again")
        return square

    def _check_tensors(self, architecture: Architecture) -> set[str]:
        """Checks names, shapes and dtypes of all updates; returns θ's names of what they change, the same in all of them."""
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
                    raise UpdateError(f"not a model trained from a published copy: {error}") from error
            names.append({originals[name] for name in check_tensors(update, specs, counted)})
        for update, mine in zip(self._updates[1:], names[1:], strict=True):
            if difference := sorted(mine ^ names[0]):
                raise UpdateError(
                    f"{update.tensors.path} and {self._updates[0].tensors.path} update different tensors, the first is "
                    f"{difference[0]}; every copy must be trained alike, or the noise does not cancel"
                )
        return names[0]


def _numbered(slices: list[RowSlice]) -> list[tuple[int, RowSlice]]:
    """Slices with their number within their tensor."""
    seen: dict[str, int] = {}
    numbered = []
    for rows in slices:
        numbered.append((seen.get(rows.name, 0), rows))
        seen[rows.name] = numbered[-1][0] + 1
    return numbered


def _square(value: torch.Tensor) -> float:
    flat = value.flatten()
    return sum(float(torch.dot(flat[a:b], flat[a:b])) for a, b in chunks(flat.numel(), 1, 1, value.device))
