"""Computes the next model θ + η Δ̄ slice by slice, and validates the updates while reading them.

Δ̄ = Σ_k w_k T_k⁻¹(Δ'_k) is the weighted sum of the clients' updates Δ'_k of all copies k, each with its
reparameterization T_k inverted; w_k are the weights of the copy design, and η is the server step size.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, TensorWriter, copy_companions, tensor_digest
from mpunlearn.errors import CheckpointError, StateError, UnsupportedModelError, UpdateError
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import FACTORS, ReceivedUpdate, derived_config
from mpunlearn.server.publisher import Publisher, check_range
from mpunlearn.server.state import RoundRecord
from mpunlearn.server.stream import RowSlice, chunks, compute_dtype, in_parallel, on_device, read, row_slices
from mpunlearn.server.updates import Specs, check_norm, check_tensors
from mpunlearn.server.workspace import Workspace

NORM_TOLERANCE = 1e-3
"""Relative tolerance between norms as computed by `examine` and by this module."""


def match(updates: Sequence[str | Path], run: str, record: RoundRecord) -> list[ReceivedUpdate]:
    """Opens updates and sorts them by copy.

    Raises:
        UpdateError: there is not exactly one update for each copy of the round.
    """
    copies = record.perturbation.copies
    by_copy: dict[int, ReceivedUpdate] = {}
    for path in updates:
        update = ReceivedUpdate.open(path)
        card = update.card
        if card.run != run or card.round != record.round or card.copies != copies:
            expected = f"a copy of {copies}, round {record.round}, run {run[:8]}"
            raise UpdateError(f"{path}: belongs to {card}; expected {expected}")
        if card.copy in by_copy:
            raise UpdateError(
                f"{path}: belongs to copy {card.copy}, and so does {by_copy[card.copy].tensors.path}; expected one "
                "update per copy"
            )
        by_copy[card.copy] = update
    if missing := [copy for copy in range(1, copies + 1) if copy not in by_copy]:
        raise UpdateError(
            f"no update for {'copy' if len(missing) == 1 else 'copies'} {', '.join(map(str, missing))} of round "
            f"{record.round}; all {copies} are needed, or the noise does not cancel"
        )
    return [by_copy[copy] for copy in sorted(by_copy)]


class Aggregation:
    """The aggregation of one round.

    Args:
        source: θ, the model that the round was published from.
        record: the record of the round.
        architecture: the model's architecture.
        publisher: the publisher of the round.
        updates: one update per copy, in order.
        eta: server step size η.

    Raises:
        UpdateError: an update does not match the model, or the updates change different tensors.
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
        """Original names of the tensors that the updates change."""

    def write(self, out: Path, specs: Specs, finish: Callable[[Path], None]) -> dict[str, list[str]]:
        """Writes θ + η Δ̄ into a new directory.

        Args:
            out: the new directory.
            specs: dtype and shape of every tensor of the result.
            finish: called with the complete directory before it becomes visible.

        Returns:
            SHA-256 of each slice of each tensor of the result.

        Raises:
            StateError: θ has changed since the round was published.
            UpdateError: an update has NaN or infinite values, or is larger than the model.
            FileError: `out` cannot be written.
        """
        with new_directory(out, mode=0o700) as folder:
            copy_companions(self._source.path, folder)
            write_json(folder / "config.json", derived_config(self._source.config, specs))
            with TensorWriter(folder, specs) as writer:

                def work(item: tuple[int, RowSlice], workspace: Workspace) -> tuple[float, list[float], str]:
                    number, rows = item
                    value, square, squares = self._slice(number, rows, workspace)
                    dtype = specs[rows.name][0]
                    cast = value if value.dtype == dtype else workspace.copy(value, dtype)
                    check_range(cast, value, rows.name)
                    writer.write_rows(rows.name, rows.start, cast)
                    return square, squares, tensor_digest(cast)

                slices = _numbered(row_slices(self._source, self._roles))
                what = f"round {self._record.round}: aggregating {len(self._updates)} updates"
                results = in_parallel(slices, work, what, lambda item: len(item[1]))
            of_model = sum(square for square, *_ in results)
            for copy, update in enumerate(self._updates):
                norm = sum(squares[copy] for _, squares, _ in results)
                check_norm(update.tensors.path, norm, of_model, NORM_TOLERANCE)
            finish(folder)
        digests: dict[str, list[str]] = {}
        for (_, rows), (*_, digest) in zip(slices, results, strict=True):
            digests.setdefault(rows.name, []).append(digest)
        return digests

    def _slice(self, number: int, rows: RowSlice, workspace: Workspace) -> tuple[torch.Tensor, float, list[float]]:
        """Returns θ + η Δ̄ for a slice, in the compute dtype, and the slice's squared norms of θ and of each update."""
        stored = read(self._source, rows.name, rows, workspace)
        if tensor_digest(stored) != self._record.digests[rows.name][number]:
            raise StateError(
                f"{self._source.path}: {rows.name} has changed since round {self._record.round} was published; restore "
                "that checkpoint, or give its new location with --checkpoint"
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
            path = self._updates[copy].tensors.path
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
                    f"{update.tensors.path} and {self._updates[0].tensors.path} update different tensors, first "
                    f"{difference[0]}; train all copies alike, or the noise does not cancel"
                )
        return names[0]


def _numbered(slices: list[RowSlice]) -> list[tuple[int, RowSlice]]:
    """Pairs each slice with its index within its tensor."""
    seen: dict[str, int] = {}
    numbered = []
    for rows in slices:
        numbered.append((seen.get(rows.name, 0), rows))
        seen[rows.name] = numbered[-1][0] + 1
    return numbered


def _square(value: torch.Tensor) -> float:
    flat = value.flatten()
    return sum(float(torch.dot(flat[a:b], flat[a:b])) for a, b in chunks(flat.numel(), 1, 1, value.device))
