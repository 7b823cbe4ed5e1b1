"""The noise of the published copies: its level per block, its values, and how much of it survives rounding.

The noise level (standard deviation) of block ℓ is σ_ℓ = κ · RMS(v_ℓ), where v is the task vector θ - θ_base if a public
base model is given, and θ itself otherwise (arXiv 2602.23798, section on Pre-Process). A block is a transformer layer,
or a single tensor outside the layers (embedding, final norm, LM head). The noise of all m copies is a linear
combination of D independent draws per tensor, each of which is a seekable stream derived from the run's secret.

Weights stored in bfloat16 lie on a grid, and so do their published values, so noise far below the grid spacing is
rounded away. `rounded_entropy` is the entropy of the noise that remains; a noise floor of one grid spacing (`floored`)
keeps about two bits per entry.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from mpunlearn.architecture import TensorRole
from mpunlearn.checkpoint import Checkpoint, tensor_digest
from mpunlearn.errors import CheckpointError
from mpunlearn.server.design import CopyDesign
from mpunlearn.server.secret import Stream
from mpunlearn.server.stream import RowSlice, chunks, compute_dtype, in_parallel, read, row_slices
from mpunlearn.server.workspace import Workspace


def block_of(name: str, role: TensorRole) -> str:
    """The name of the block that a tensor belongs to; all tensors of a block have the same noise level."""
    return name if role.layer is None else f"layer {role.layer}"


@dataclass(frozen=True)
class Measurement:
    """The results of one pass over a model."""

    rms: dict[str, float]
    """RMS of v per block, in units of the weights."""
    weights: dict[str, float]
    """RMS of θ per block; the same as `rms` without a base."""
    squares: dict[str, float]
    """Squared norm of each tensor of θ."""
    counts: dict[str, int]
    """Number of entries of each tensor."""
    digests: dict[str, list[str]]
    """SHA-256 of each slice of each tensor of θ."""
    base: str | None
    """SHA-256 over the base model's tensors, if there is a base."""


def measure(checkpoint: Checkpoint, base: Checkpoint | None, roles: Mapping[str, TensorRole]) -> Measurement:
    """Measures RMS values and digests in one pass over θ (and θ_base).

    Raises:
        CheckpointError: a weight is NaN or infinite, or the tensors of the base have different names or shapes.
    """
    if base is not None:
        for name in roles:
            _check_base(base, checkpoint, name)

    def work(rows: RowSlice, workspace: Workspace) -> tuple[float, float, int, str, str]:
        stored = read(checkpoint, rows.name, rows, workspace)
        other = read(base, rows.name, rows, workspace) if base is not None else None
        square = weights = 0.0
        # Fixed chunks, each summed in one thread, so that the result does not depend on the number of threads.
        for start, stop in chunks(stored.numel(), 1, 1):
            with workspace.frame():
                value = workspace.copy(stored.view(-1)[start:stop], compute_dtype(stored.dtype))
                weights += float(torch.dot(value, value))
                if other is not None:
                    value.sub_(workspace.copy(other.view(-1)[start:stop], value.dtype))
                square += float(torch.dot(value, value))
        if not math.isfinite(square):
            raise CheckpointError(
                f"{checkpoint.path}: {rows.name} holds NaN or infinite weights; nothing was published"
            )
        return square, weights, stored.numel(), tensor_digest(stored), "" if other is None else tensor_digest(other)

    slices = row_slices(checkpoint, roles)
    results = in_parallel(slices, work, "measuring the model", len)
    blocks: dict[str, list[float]] = {}
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    digests: dict[str, list[str]] = {}
    for rows, (square, weights, count, digest, _) in zip(slices, results, strict=True):
        sums = blocks.setdefault(block_of(rows.name, rows.role), [0.0, 0.0, 0])
        blocks[block_of(rows.name, rows.role)] = [sums[0] + square, sums[1] + weights, sums[2] + count]
        squares[rows.name] = squares.get(rows.name, 0.0) + weights
        counts[rows.name] = counts.get(rows.name, 0) + count
        digests.setdefault(rows.name, []).append(digest)
    rms, rms_of_weights = (
        {block: math.sqrt(sums[part] / sums[2]) for block, sums in blocks.items()} for part in (0, 1)
    )
    joined = None
    if base is not None:
        text = bytearray("".join(digest for *_, digest in results).encode())
        joined = tensor_digest(torch.frombuffer(text, dtype=torch.uint8))
    return Measurement(rms, rms_of_weights, squares, counts, digests, joined)


def _check_base(base: Checkpoint, checkpoint: Checkpoint, name: str) -> None:
    expected = checkpoint.tensors[name].shape
    actual = base.tensors[name].shape if name in base.tensors else None
    if actual != expected:
        raise CheckpointError(
            f"--base {base.path}: {name} has shape {list(actual) if actual else None}, expected {list(expected)} as in "
            f"{checkpoint.path}; the base must be the checkpoint that this model was fine-tuned from"
        )


def draw(streams: list[Stream], start: int, like: torch.Tensor, workspace: Workspace) -> list[torch.Tensor]:
    """Standard normals from each stream, starting at entry `start`, with the shape, dtype and device of `like`."""
    draws = [workspace.empty(tuple(like.shape), like.dtype, like.device) for _ in streams]
    for stream, out in zip(streams, draws, strict=True):
        stream.normals(like.numel(), start, out=out.view(-1), workspace=workspace)
    return draws


def noisy(
    value: torch.Tensor,
    draws: list[torch.Tensor],
    design: CopyDesign,
    sigma: float | torch.Tensor,
    copy: int,
    workspace: Workspace,
) -> torch.Tensor:
    """Computes θ + ε_k with ε_k = σ Σ_d A_kd z_d. Without noise, returns `value` itself.

    Args:
        value: θ, float32 or float64.
        draws: z_1 … z_D, in the shape and dtype of `value`; empty for no noise.
        design: the copy design with the coefficients A.
        sigma: σ, one value or one per entry, in units of the weights.
        copy: k, starting at 0.
        workspace: memory for the result.
    """
    if not draws:
        return value
    out = workspace.empty(tuple(value.shape), value.dtype, value.device)
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
    """The distance between neighboring numbers of `dtype` at the magnitude of each entry, in the dtype of `value`.

    It is eps · 2^exponent for normal numbers, and that of the smallest normal number for subnormal ones.

    Args:
        value: float32 or float64.
        dtype: dtype of the grid.
    """
    info = torch.finfo(dtype)
    mask, integer = (0x7F800000, torch.int32) if value.dtype == torch.float32 else (0x7FF0 << 48, torch.int64)
    power = value.view(integer).bitwise_and(mask).view(value.dtype)
    return power.clamp_(min=info.smallest_normal).mul_(info.eps)


def floored(sigma: float, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The noise level of each entry: `sigma`, but at least the spacing of `dtype` at that entry."""
    return spacing(value, dtype).clamp_(min=sigma)


def rounded_entropy(ratio: np.ndarray) -> np.ndarray:
    """Entropy, in bits, of N(0, σ²) rounded to a grid, as a function of σ / spacing.

    For σ ≥ spacing it is log2(√(2πe) σ / spacing) = log2(4.13 σ / spacing); for much smaller σ it vanishes.
    """
    ratio = np.asarray(ratio, dtype=np.float64)
    known, table = _entropy_table()
    above = np.log2(np.sqrt(2 * np.pi * np.e) * np.maximum(ratio, 1e-300))
    inside = np.interp(np.log(np.clip(ratio, known[0], known[-1])), np.log(known), table)
    return np.where(ratio >= known[-1], above, np.where(ratio < known[0], 0.0, inside))


@cache
def _entropy_table() -> tuple[np.ndarray, np.ndarray]:
    """200 ratios from 0.01 to 10, and the entropy at each."""
    known = np.logspace(-2, 1, 200)
    return known, np.array([_entropy(ratio) for ratio in known])


def _entropy(ratio: float) -> float:
    reach = math.ceil(9 * ratio) + 1
    edges = [(k - 0.5) / ratio / math.sqrt(2) for k in range(-reach, reach + 2)]
    cumulative = np.array([math.erf(edge) for edge in edges])
    p = np.diff(cumulative) / 2
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())
