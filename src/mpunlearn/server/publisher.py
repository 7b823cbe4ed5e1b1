"""Computes the tensors of the published copies, slice by slice.

The steps are: add the secret offset that all copies share, add noise, apply the rotations, cast to the storage dtype,
apply the signed permutations. The cast happens only once, because signed permutations involve no rounding. The result
is deterministic, so the server need not store what it has published; it can recompute any part of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mpunlearn.architecture import Architecture, TensorRole
from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint, tensor_digest
from mpunlearn.errors import StateError, UnsupportedModelError
from mpunlearn.server.keys import Labels, Wanted
from mpunlearn.server.noise import block_of, draw, floored, noisy, rounded_entropy, spacing
from mpunlearn.server.offset import Offset
from mpunlearn.server.reparameterization import Reparameterization
from mpunlearn.server.secret import BLOCK, Streams
from mpunlearn.server.state import RoundRecord
from mpunlearn.server.stream import RowSlice, chunks, compute_dtype, on_device
from mpunlearn.server.workspace import Workspace

SAMPLE = 4096
"""Number of entries of a slice from which the residual entropy is estimated."""


@dataclass(frozen=True)
class PublishedRows:
    """A slice of the published copies."""

    rows: list[torch.Tensor]
    """The slice in each copy, in the published dtype, in memory borrowed from the workspace."""
    equal: list[int]
    """For each copy, the number of entries that equal those of θ before the reparameterization."""


class Publisher:
    """Computes T_k(θ + c + ε_k) for the copies k of one round: offset c, noise ε_k, reparameterization T_k.

    Args:
        secret: the run's secret.
        record: the record of the round.
        architecture: the model's architecture.
        device: device of the computation (default: CPU).
        offset: the offset c (default: none).
    """

    def __init__(
        self,
        secret: Streams,
        record: RoundRecord,
        architecture: Architecture,
        device: torch.device | None = None,
        offset: Offset | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self._secret, self._record, self._offset = secret, record, offset or Offset(None)
        self._architecture = architecture
        self.perturbation = record.perturbation
        self.design = self.perturbation.design(record.alphas)
        strength = self.perturbation.reparameterization
        self.maps = [
            Reparameterization(architecture, strength, secret, record.inputs, copy, self.device)
            for copy in range(self.design.copies)
        ]
        self._quietest = int((self.design.coefficients**2).sum(axis=1).argmin())

    def dtype(self, name: str) -> torch.dtype:
        """The storage dtype of a tensor in the copies."""
        return FLOAT_DTYPES[self.perturbation.publish_dtype or self._record.dtypes[name]]

    def sigma(self, rows: RowSlice) -> float:
        """The noise level σ of a slice's block, in units of the weights; 0 without noise."""
        if rows.role.layer is None and self.perturbation.noise_scope == "layers":
            return 0.0
        return self._record.sigma[block_of(rows.name, rows.role)] if self.design.draws else 0.0

    def streams(self, names: Mapping[str, TensorRole]) -> set[Labels]:
        """The names of all streams that the published values of some tensors, in all copies, are computed from."""
        wanted, strength = Wanted(), self.perturbation.reparameterization
        for copy in range(self.design.copies):
            maps = Reparameterization(self._architecture, strength, wanted, self._record.inputs, copy)
            for name, role in names.items():
                maps.maps(role)
                maps.published_name(name, role)
        return wanted.names.union(*(self._noise(RowSlice(name, role, 0, 0)) for name, role in names.items()))

    def _noise(self, rows: RowSlice) -> list[Labels]:
        """The names of the streams of a tensor's noise."""
        draws = self.design.draws if self.sigma(rows) else 0
        return [("noise", self._record.inputs, number, rows.name) for number in range(draws)]

    def publish(
        self, rows: RowSlice, stored: torch.Tensor, workspace: Workspace, copies: list[int] | None = None
    ) -> PublishedRows:
        """Computes T_k(θ + c + ε_k) for one slice.

        Args:
            rows: the slice.
            stored: the values of θ in the slice.
            workspace: memory for the result, which is valid until the end of the caller's frame.
            copies: indices of the copies to compute, starting at 0 (default: all).

        Raises:
            UnsupportedModelError: a value exceeds the range of the published dtype.
        """
        copies = list(range(self.design.copies)) if copies is None else copies
        dtype, sigma, device = self.dtype(rows.name), self.sigma(rows), self.device
        streams = [self._secret.stream(*name) for name in self._noise(rows)]
        row_entries = stored.numel() // max(1, len(stored))
        maps = [self.maps[copy].maps(rows.role) for copy in copies]
        published = [workspace.empty(tuple(stored.shape), dtype, device) for _ in copies]
        equal = [0] * len(copies)
        aligned = {"first": rows.start, "block": BLOCK}
        if self._offset.mixes(rows.name) or any(axis_map.blocks is not None for axes in maps for axis_map in axes):
            aligned = {}  # the last bit of a product of matrices can depend on the chunks, and old runs have these
        for start, stop in chunks(len(stored), row_entries, maps[0][0].block, device, **aligned):
            with workspace.frame():
                original = on_device(stored[start:stop], device, workspace)
                value = workspace.copy(original, compute_dtype(stored.dtype))
                self._offset.add(value, rows, start, workspace)
                draws = draw(streams, (rows.start + start) * row_entries, value, workspace)
                level = self._level(sigma, value, stored.dtype, dtype)
                for number, (copy, axes) in enumerate(zip(copies, maps, strict=True)):
                    with workspace.frame():
                        perturbed = noisy(value, draws, self.design, level, copy, workspace)
                        cast = workspace.copy(perturbed, dtype)
                        if draws:
                            equal[number] += _count_equal(cast, original)
                        if any(axis_map.blocks is not None for axis_map in axes):
                            for axis, axis_map in enumerate(axes):
                                perturbed = axis_map.rotate(perturbed, axis, 0 if axis else start)
                            cast.copy_(perturbed)
                        check_range(cast, perturbed, rows.name)
                        for axis, axis_map in list(enumerate(axes))[1:]:
                            cast = axis_map.arrange(cast, axis)
                        axes[0].scatter(published[number], cast, start)
        return PublishedRows(published, equal)

    def _level(
        self, sigma: float, value: torch.Tensor, stored: torch.dtype, dtype: torch.dtype
    ) -> float | torch.Tensor:
        if self.perturbation.noise_floor == "none" or not sigma:
            return sigma
        coarser = max(stored, dtype, key=lambda kind: torch.finfo(kind).eps)
        return floored(sigma, value, coarser)

    def residual_entropy(self, rows: RowSlice, stored: torch.Tensor) -> float:
        """Mean residual entropy (bits per entry) of the least noisy copy's noise on the grid of θ, over a sample."""
        flat = stored.flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)].to(compute_dtype(stored.dtype))
        level = self._level(self.sigma(rows), sample, stored.dtype, self.dtype(rows.name))
        scale = float((self.design.coefficients[self._quietest] ** 2).sum() ** 0.5)
        ratio = scale * level / spacing(sample, stored.dtype)
        return float(rounded_entropy(ratio.double().numpy()).mean())


def check_unchanged(source: Checkpoint, record: RoundRecord, rows: RowSlice, stored: torch.Tensor) -> None:
    """Checks that a slice of θ is what it was when the round was opened.

    Raises:
        StateError: it is not.
    """
    if tensor_digest(stored) != record.digests[rows.name][rows.number]:
        raise StateError(
            f"{source.place}: {rows.name} has changed since round {record.round} was published; restore that checkpoint, or "
            "give its new location with --checkpoint"
        )


def check_range(cast: torch.Tensor, value: torch.Tensor, name: str) -> None:
    """Checks the cast of the values of a tensor for overflow, which is possible only in float16.

    Raises:
        UnsupportedModelError: an entry exceeds the range of the dtype of `cast`.
    """
    if torch.finfo(cast.dtype).max < 1e30 and not bool(torch.isfinite(cast).all()):
        raise UnsupportedModelError(
            f"{name}: value {float(value.abs().max()):.3g} exceeds the range of {cast.dtype}; use bfloat16 or float32"
        )


def _count_equal(cast: torch.Tensor, original: torch.Tensor) -> int:
    """The number of entries of the published values, before the reparameterization, that equal those of θ."""
    if cast.dtype != original.dtype or cast.device.type != "cpu":
        return int(torch.count_nonzero(cast == original))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[cast.dtype.itemsize]
    # NumPy compares and counts many times faster than torch.
    return int(np.count_nonzero(cast.view(bits).numpy() == original.view(bits).numpy()))
