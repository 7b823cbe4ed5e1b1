"""The copies' noise: its level per block, and its values one tensor at a time.

σ_ℓ = κ · RMS(v_ℓ) with v the task vector θ - θ_base where a public base is given, else θ itself (arXiv 2602.23798, section
on Pre-Process). A block is a transformer layer; a tensor outside the layers (embedding, final norm, LM head) is a block of
its own. The D draws of a tensor are streams of the run's secret, so any tensor's noise can be drawn at any time, and the m
copies' noise comes from those D draws alone.
"""

import math
from collections.abc import Mapping

import torch

from mpunlearn.architecture import Place
from mpunlearn.architecture.spaces import compute_dtype
from mpunlearn.checkpoint import Checkpoint, tensor_digest
from mpunlearn.errors import CheckpointError
from mpunlearn.server.design import CopyDesign
from mpunlearn.server.secret import Secret


def block_of(name: str, place: Place) -> str:
    """The block whose noise level a tensor shares."""
    return name if place.layer is None else f"layer {place.layer}"


def measure(
    checkpoint: Checkpoint, base: Checkpoint | None, places: Mapping[str, Place]
) -> tuple[dict[str, float], dict[str, str]]:
    """One pass over θ (and θ_base): the RMS of v per block, in units of the weights, and the SHA-256 of each tensor of θ.

    Raises:
        CheckpointError: a weight is NaN or infinite, or the base has other tensors or shapes.
    """
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    digests: dict[str, str] = {}
    for name, place in places.items():
        stored = checkpoint.read(name)
        digests[name] = tensor_digest(stored)
        value = stored.to(compute_dtype(stored.dtype))
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{checkpoint.path}: {name} holds NaN or infinite weights; nothing was published")
        if base is not None:
            value = value - _base_tensor(base, checkpoint, name).to(value.dtype)
        block = block_of(name, place)
        squares[block] = squares.get(block, 0.0) + float(value.square().sum(dtype=torch.float64))
        counts[block] = counts.get(block, 0) + value.numel()
    return {block: math.sqrt(squares[block] / counts[block]) for block in squares}, digests


def _base_tensor(base: Checkpoint, checkpoint: Checkpoint, name: str) -> torch.Tensor:
    expected = checkpoint.tensors[name].shape
    found = base.tensors[name].shape if name in base.tensors else None
    if found != expected:
        raise CheckpointError(
            f"--base {base.path}: {name} has shape {list(found) if found else None}, expected {list(expected)} as in "
            f"{checkpoint.path}; the base must be the checkpoint that this model was trained from"
        )
    return base.read(name)


def draw(secret: Secret, design: CopyDesign, round_number: int, name: str, like: torch.Tensor) -> list[torch.Tensor]:
    """The D standard normal draws of one tensor, in the shape and dtype of `like`."""
    return [
        secret.stream("noise", round_number, number, name).normals(like.numel()).reshape(like.shape).to(like.dtype)
        for number in range(design.draws)
    ]


def copy_noise(draws: list[torch.Tensor], design: CopyDesign, sigma: float, copy: int) -> torch.Tensor | None:
    """ε_k = σ Σ_d A_kd z_d of copy number `copy` (from 0), in the draws' shape and dtype; None if there is no noise."""
    if not draws or sigma == 0:
        return None
    noise = draws[0] * float(sigma * design.coefficients[copy, 0])
    for values, coefficient in zip(draws[1:], design.coefficients[copy, 1:], strict=True):
        noise.add_(values, alpha=float(sigma * coefficient))
    return noise
