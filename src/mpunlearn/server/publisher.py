"""Publisher."""

import numpy as np
import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import FLOAT_DTYPES
from mpunlearn.errors import UnsupportedModelError
from mpunlearn.server.noise import block_of, draw, floored, noisy, spacing, uncertainty
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.reparameterization import Reparameterization
from mpunlearn.server.secret import Secret
from mpunlearn.server.state import RoundRecord
from mpunlearn.server.stream import RowSlice, chunks, compute_dtype, on_device
from mpunlearn.server.workspace import scratch

SAMPLE = 4096
"""Entries of a piece from which the bits of doubt are estimated."""


class Publisher:
    """Computes published tensors, the same whenever it is asked.

    Args:
        secret: the run's secret.
        record: the round.
        architecture: the model's.
        device: where the arithmetic runs.
    """

    def __init__(
        self, secret: Secret, record: RoundRecord, architecture: Architecture, device: torch.device | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        self._secret, self._record, self._inputs = secret, record, record.inputs
        self.perturbation = Perturbation(**record.settings)
        self.design = self.perturbation.design(record.alphas)
        self.maps = [
            Reparameterization(
                architecture, self.perturbation.reparameterization, secret, self._inputs, copy, self.device
            )
            for copy in range(self.design.copies)
        ]
        self._quietest = int((self.design.coefficients**2).sum(axis=1).argmin())

    def dtype(self, name: str) -> torch.dtype:
        """The storage dtype of a tensor in the copies."""
        return FLOAT_DTYPES[self.perturbation.publish_dtype or self._record.dtypes[name]]

    def sigma(self, piece: RowSlice) -> float:
        """The noise level of a piece's block, in units of the weights; 0 where there is no noise."""
        if piece.place.layer is None and self.perturbation.noise_scope == "layers":
            return 0.0
        return self._record.sigma[block_of(piece.name, piece.place)] if self.design.draws else 0.0

    def publish(
        self, piece: RowSlice, stored: torch.Tensor, copies: list[int] | None = None
    ) -> tuple[list[torch.Tensor], list[int]]:
        """T_k(θ + ε_k) of a piece.

        Args:
            stored: the piece's rows of θ.
            copies: for which copies (from 0; default all).

        Returns:
            The rows for each copy, in the published dtype, in scratch memory of the device; and for each how many entries
            equal θ's before the change of basis.

        Raises:
            UnsupportedModelError: a value leaves the range of the published dtype.
        """
        copies = list(range(self.design.copies)) if copies is None else copies
        dtype, sigma, device = self.dtype(piece.name), self.sigma(piece), self.device
        streams = [
            self._secret.stream("noise", self._inputs, number, piece.name)
            for number in range(self.design.draws if sigma else 0)
        ]
        rows, row = len(stored), stored.numel() // max(1, len(stored))
        maps = [self.maps[copy].maps(piece.place) for copy in copies]
        published = [scratch(f"published {copy}", tuple(stored.shape), dtype, device) for copy in copies]
        equal = [0] * len(copies)
        arithmetic = compute_dtype(stored.dtype)
        for start, stop in chunks(rows, row, maps[0][0].block, device):
            original = on_device(stored[start:stop], device, "original")
            value = scratch("value", tuple(original.shape), arithmetic, device).copy_(original)
            draws = draw(streams, (piece.start + start) * row, value)
            level = self._level(sigma, value, stored.dtype, dtype)
            for number, (copy, axes) in enumerate(zip(copies, maps, strict=True)):
                shown = noisy(value, draws, self.design, level, copy)
                if draws:
                    equal[number] += _equal(shown, original, dtype)
                shown = axes[0].rotate(shown, 0, start)
                for axis, axis_map in list(enumerate(axes))[1:]:
                    shown = axis_map.apply(shown, axis)
                cast = scratch("cast", tuple(shown.shape), dtype, device)
                axes[0].scatter(published[number], checked_cast(shown, dtype, piece.name, cast), start)
        return published, equal

    def _level(
        self, sigma: float, value: torch.Tensor, stored: torch.dtype, dtype: torch.dtype
    ) -> float | torch.Tensor:
        if self.perturbation.noise_floor == "none" or not sigma:
            return sigma
        coarser = max(stored, dtype, key=lambda kind: torch.finfo(kind).eps)
        return floored(sigma, value, coarser)

    def bits(self, piece: RowSlice, stored: torch.Tensor) -> float:
        """Mean bits of doubt about an entry of a piece, from a sample of its entries."""
        flat = stored.flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)].to(compute_dtype(stored.dtype))
        level = self._level(self.sigma(piece), sample, stored.dtype, self.dtype(piece.name))
        scale = float((self.design.coefficients[self._quietest] ** 2).sum() ** 0.5)
        ratio = scale * level / spacing(sample, stored.dtype)
        return float(uncertainty(ratio.double().numpy()).mean())


def _equal(value: torch.Tensor, original: torch.Tensor, dtype: torch.dtype) -> int:
    """How many entries of a value, once cast to `dtype`, equal the original's."""
    cast = scratch("cast", tuple(value.shape), dtype, value.device).copy_(value)
    if dtype != original.dtype or value.device.type != "cpu":
        return int(torch.count_nonzero(cast == original))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    # numpy compares and counts many times faster than torch.
    return int(np.count_nonzero(cast.view(bits).numpy() == original.view(bits).numpy()))


def checked_cast(value: torch.Tensor, dtype: torch.dtype, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """The value in `dtype` (into `out` where it is given), once it is known that nothing overflowed.

    Only float16 has a smaller range than float32.

    Raises:
        UnsupportedModelError: an entry of the tensor `name` leaves the range.
    """
    cast = value.to(dtype) if out is None else out.copy_(value)
    if torch.finfo(dtype).max < 1e30 and not bool(torch.isfinite(cast).all()):
        raise UnsupportedModelError(
            f"{name}: a value of {float(value.abs().max()):.3g} leaves the range of {dtype}; use bfloat16 or float32"
        )
    return cast
