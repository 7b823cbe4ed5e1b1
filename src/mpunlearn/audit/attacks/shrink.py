"""Removes noise from a single estimate by shrinking singular values.

Source: Gavish and Donoho, Optimal Shrinkage of Singular Values (arXiv 1405.7511), equation 7. Independent noise spreads
over all singular values of a matrix, while trained weights, and still more the difference that fine-tuning makes,
concentrate in a few. Orthogonal maps do not change singular values, so no alignment is needed.
Threat model: a client holds one estimate of θ, with noise that nothing cancels, and knows how strong the noise is, as
public settings tell. With the public base, it shrinks the difference from it.

Not covered: noise that is shaped, which this takes for independent entries of one level per block.
"""

import math

import torch

from mpunlearn.audit.weights import Model
from mpunlearn.server.noise import block_of


def shrink(estimate: Model, noise: float, public: Model | None = None) -> Model:
    """The estimate with less noise.

    Args:
        estimate: θ with noise, in any coordinates; with `public`, in its coordinates.
        noise: standard deviation of the noise, relative to the RMS of θ, or of its difference from `public`.
        public: the model that θ was fine-tuned from.
    """
    differences = {
        name: value.double() - (public.weights[name].double() if public else 0.0)
        for name, value in estimate.weights.items()
    }
    squares: dict[str, float] = {}
    entries: dict[str, int] = {}
    for name, value in differences.items():
        block = block_of(name, estimate.role(name))
        squares[block] = squares.get(block, 0.0) + float(value.square().sum())
        entries[block] = entries.get(block, 0) + value.numel()
    weights = {}
    for name, value in differences.items():
        block = block_of(name, estimate.role(name))
        sigma = math.sqrt(squares[block] / max(1, entries[block]) * noise**2 / (1 + noise**2))
        shrunk = shrunk_matrix(value, sigma) if value.dim() == 2 and sigma else value
        stored = estimate.weights[name].dtype
        weights[name] = (shrunk + (public.weights[name].double() if public else 0.0)).to(stored)
    return Model(estimate.architecture, weights)


def shrunk_matrix(value: torch.Tensor, sigma: float) -> torch.Tensor:
    """The matrix with its singular values shrunk so that the expected squared error is the least.

    Args:
        value: a matrix plus independent noise, float64.
        sigma: standard deviation of the noise.
    """
    tall = value if value.shape[0] >= value.shape[1] else value.T
    beta = tall.shape[1] / tall.shape[0]
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    y2 = squares.clamp(min=0) / (sigma**2 * tall.shape[0])
    kept = y2 > (1 + math.sqrt(beta)) ** 2
    ratio = torch.where(kept, ((y2 - beta - 1).square() - 4 * beta).clamp(min=0).sqrt() / y2.clamp(min=1e-300), 0.0)
    shrunk: torch.Tensor = tall @ (vectors * ratio) @ vectors.T
    return shrunk if tall is value else shrunk.T
