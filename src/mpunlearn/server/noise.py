"""The copies' noise: its level per block, its values, and what the storage dtype leaves of it.

σ_ℓ = κ · RMS(v_ℓ) with v the task vector θ - θ_base where a public base is given, else θ itself (arXiv 2602.23798, section
on Pre-Process). A block is a transformer layer; a tensor outside the layers (embedding, final norm, LM head) is a block of
its own. The D draws of a tensor are streams of the run's secret, seekable, and the m copies' noise comes from them alone.

A weight that is stored in bfloat16 lies on a grid, and so does its published value: noise far below the grid's spacing is
rounded away. `uncertainty` says how many bits the noise leaves in doubt, and a noise floor of one spacing (`floored`) keeps
about two of them at every entry.
"""

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch

from mpunlearn.architecture import TensorRole
from mpunlearn.checkpoint import Checkpoint, tensor_digest
from mpunlearn.errors import CheckpointError
from mpunlearn.server.design import CopyDesign
from mpunlearn.server.secret import Stream
from mpunlearn.server.stream import RowSlice, chunks, compute_dtype, in_parallel, read, row_slices
from mpunlearn.server.workspace import scratch


def block_of(name: str, place: TensorRole) -> str:
    """The block whose noise level a tensor shares."""
    return name if place.layer is None else f"layer {place.layer}"


def measure(
    checkpoint: Checkpoint, base: Checkpoint | None, places: Mapping[str, TensorRole]
) -> tuple[dict[str, float], dict[str, list[str]], str | None]:
    """One pass over θ (and θ_base).

    Returns:
        The RMS of v per block, in units of the weights; the SHA-256 of each piece of each tensor of θ; and one over the base.

    Raises:
        CheckpointError: a weight is NaN or infinite, or the base has other tensors or shapes.
    """
    if base is not None:
        for name in places:
            _check_base(base, checkpoint, name)

    def work(piece: RowSlice) -> tuple[float, int, str, str]:
        stored = read(checkpoint, piece.name, piece, "stored")
        other = read(base, piece.name, piece, "stored base") if base is not None else None
        square = 0.0
        # Always over the same chunks and in one thread: the sum does not depend on how many there are.
        for start, stop in chunks(stored.numel(), 1, 1):
            value = scratch("value", (stop - start,), compute_dtype(stored.dtype)).copy_(stored.view(-1)[start:stop])
            if other is not None:
                value.sub_(scratch("base", (stop - start,), value.dtype).copy_(other.view(-1)[start:stop]))
            square += float(torch.dot(value, value))
        if not math.isfinite(square):
            raise CheckpointError(
                f"{checkpoint.path}: {piece.name} holds NaN or infinite weights; nothing was published"
            )
        return square, stored.numel(), tensor_digest(stored), "" if other is None else tensor_digest(other)

    cut = row_slices(checkpoint, places)
    results = in_parallel(cut, work, "measuring the model", lambda piece: piece.stop - piece.start)
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    digests: dict[str, list[str]] = {}
    for piece, (square, count, digest, _) in zip(cut, results, strict=True):
        block = block_of(piece.name, piece.place)
        squares[block] = squares.get(block, 0.0) + square
        counts[block] = counts.get(block, 0) + count
        digests.setdefault(piece.name, []).append(digest)
    joined = (
        torch.frombuffer(bytearray("".join(digest for *_, digest in results).encode()), dtype=torch.uint8)
        if base
        else None
    )
    rms = {block: math.sqrt(squares[block] / counts[block]) for block in squares}
    return rms, digests, None if joined is None else tensor_digest(joined)


def _check_base(base: Checkpoint, checkpoint: Checkpoint, name: str) -> None:
    expected = checkpoint.tensors[name].shape
    found = base.tensors[name].shape if name in base.tensors else None
    if found != expected:
        raise CheckpointError(
            f"--base {base.path}: {name} has shape {list(found) if found else None}, expected {list(expected)} as in "
            f"{checkpoint.path}; the base must be the checkpoint that this model was trained from"
        )


def draw(streams: list[Stream], start: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Standard normals from entry `start` of each stream on, in the shape, dtype and device of `like`, in scratch memory."""
    shape, dtype = tuple(like.shape), like.dtype
    draws = [scratch(f"draw {number}", shape, dtype, like.device) for number in range(len(streams))]
    for stream, out in zip(streams, draws, strict=True):
        stream.normals(like.numel(), start, out=out.view(-1))
    return draws


def noisy(
    value: torch.Tensor, draws: list[torch.Tensor], design: CopyDesign, sigma: float | torch.Tensor, copy: int
) -> torch.Tensor:
    """θ + ε_k with ε_k = σ Σ_d A_kd z_d of copy number `copy` (from 0), in scratch memory; `value` itself without noise.

    Args:
        value: θ, float32 or float64.
        draws: z_1 … z_D in the shape and dtype of `value`; empty for no noise.
        sigma: one level, or one per entry.
    """
    if not draws:
        return value
    out = scratch("noisy", tuple(value.shape), value.dtype, value.device)
    if isinstance(sigma, torch.Tensor):
        out.zero_()
        for z, coefficient in zip(draws, design.coefficients[copy], strict=True):
            out.add_(z, alpha=float(coefficient))
        return out.mul_(sigma).add_(value)
    coefficients = [float(sigma * coefficient) for coefficient in design.coefficients[copy]]
    torch.add(value, draws[0], alpha=coefficients[0], out=out)
    for z, coefficient in zip(draws[1:], coefficients[1:], strict=True):
        out.add_(z, alpha=coefficient)
    return out


def spacing(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbors in `dtype` at each entry's magnitude, in the entry's own dtype (float32 or float64).

    It is eps · 2^exponent for normal numbers; numbers below the smallest normal one have that one's spacing.
    """
    info = torch.finfo(dtype)
    mask, integer = (0x7F800000, torch.int32) if value.dtype == torch.float32 else (0x7FF0 << 48, torch.int64)
    power = value.view(integer).bitwise_and(mask).view(value.dtype)
    return power.clamp_(min=info.smallest_normal).mul_(info.eps)


def floored(sigma: float, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The noise level of each entry, raised to at least the spacing of `dtype` at that entry."""
    return spacing(value, dtype).clamp_(min=sigma)


def uncertainty(ratio: np.ndarray) -> np.ndarray:
    """Entropy in bits of N(0, σ²) rounded to a grid, as a function of σ / spacing.

    For σ of a spacing and above it is log2(√(2πe) σ / spacing) = log2(4.13 σ / spacing); far below it vanishes.
    """
    ratio = np.asarray(ratio, dtype=np.float64)
    known, table = _grid_entropies()
    above = np.log2(np.sqrt(2 * np.pi * np.e) * np.maximum(ratio, 1e-300))
    inside = np.interp(np.log(np.clip(ratio, known[0], known[-1])), np.log(known), table)
    return np.where(ratio >= known[-1], above, np.where(ratio < known[0], 0.0, inside))


@cache
def _grid_entropies() -> tuple[np.ndarray, np.ndarray]:
    """The entropy at 200 ratios from 0.01 to 10."""
    known = np.logspace(-2, 1, 200)
    return known, np.array([_grid_entropy(ratio) for ratio in known])


def _grid_entropy(ratio: float) -> float:
    reach = math.ceil(9 * ratio) + 1
    edges = [(k - 0.5) / ratio / math.sqrt(2) for k in range(-reach, reach + 2)]
    cumulative = np.array([math.erf(edge) for edge in edges])
    p = np.diff(cumulative) / 2
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())
