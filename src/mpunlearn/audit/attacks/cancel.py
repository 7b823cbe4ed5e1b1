"""Cancels the noise of several copies of one round.

Source: zero-sum noise cancels in the server's average of the updates (arXiv 2602.23798), and just so in an average of
the copies, once they are aligned to one another. The weights of that average follow from the copies alone.
Threat model: one client, or several that pool what they have, holds two or more copies of one round and knows how MPU
works. It knows neither θ, nor the maps, nor the noise scales of the harmonic design, nor which scale belongs to which copy.

Not covered: copies of several rounds (`rounds`), and noise common to all copies, which no combination of them cancels.
"""

import math
from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np
import torch

from mpunlearn.audit.alignment import Alignment, align
from mpunlearn.audit.weights import Model, rms
from mpunlearn.server.design import default_scales, extrapolated

REALIGNMENTS = 2
"""How often every copy is aligned again to the combination. Alignment errors between two noisy copies do not cancel;
those against the combination do."""
MAX_ORDERS = 5
"""With more copies than that, not every order of known scales is tried."""
Statistics = tuple[np.ndarray, np.ndarray]
"""For T tensors and m copies: mean products of the entries of copies j and k, shape (T, m, m), each divided by the mean
square of the tensor; and the number of entries, shape (T,). Float64."""


def cancel(
    copies: Sequence[Model], scales: Sequence[float] | None = None, *, whole: bool = True, only: str | None = None
) -> dict[str, Model]:
    """Estimates θ from m copies of one round.

    Args:
        copies: the copies, in any order; at least 2.
        scales: the scales x_1 … x_m if the copies are known to lie on one line, θ + x_k ε, in any order (default: the
            built-in scales for m copies, which the secret ones are close to).
        whole: whether these are all copies of the round. Of a part of them, only *minimum norm* is of use.
        only: the name of the only weights to try (default: all).

    Returns:
        Name of the weights → θ in the coordinates of the first copy. *Minimum norm* uses that independent noise makes
        weights larger. *Harmonic weights* (m ≥ 3) fits the scales α_k of zero-sum noise to the distances between
        copies. *Known scales* fits their order to the distances.
    """
    count = len(copies)
    weights: dict[str, Callable[[Statistics], np.ndarray]] = {"minimum norm": minimum_norm}
    if count >= 3 and whole:
        weights["harmonic weights"] = harmonic_weights
    known = scales if scales is not None else default_scales(count) if count in (2, 3, 4) else None
    if known is not None and count <= MAX_ORDERS and (whole or scales is not None):
        weights["known scales"] = lambda statistics: known_scales(statistics, known)
    first = [Alignment(copies[0].architecture), *(align(copies[0], copy) for copy in copies[1:])]
    return {name: _combined(copies, first, choose) for name, choose in weights.items() if only in (None, name)}


def _combined(
    copies: Sequence[Model], alignments: list[Alignment], choose: Callable[[Statistics], np.ndarray]
) -> Model:
    """Combines the copies, and twice aligns them again to the combination and combines them anew."""
    for _ in range(REALIGNMENTS):
        combination = combine(copies, alignments, choose(statistics_of(copies, alignments)))
        alignments = [align(combination, copy, known, passes=1) for copy, known in zip(copies, alignments, strict=True)]
    return combine(copies, alignments, choose(statistics_of(copies, alignments)))


def combine(copies: Sequence[Model], alignments: Sequence[Alignment], weights: Sequence[float] | np.ndarray) -> Model:
    """The weighted sum of aligned copies, computed in float64 and stored in the dtype of the copies."""
    first = copies[0]
    combined = {}
    for name, value in first.weights.items():
        total = torch.zeros(value.shape, dtype=torch.float64)
        for copy, alignment, weight in zip(copies, alignments, weights, strict=True):
            total.add_(alignment.tensor(copy, name), alpha=float(weight))
        combined[name] = total.to(value.dtype)
    return Model(first.architecture, combined)


def statistics_of(copies: Sequence[Model], alignments: Sequence[Alignment]) -> Statistics:
    """The mean products of aligned copies, tensor by tensor; see `Statistics`."""
    products, entries = [], []
    for name, value in copies[0].weights.items():
        if scale := rms(value):
            rows = [alignment.tensor(copy, name).flatten() for copy, alignment in zip(copies, alignments, strict=True)]
            stacked = torch.stack(rows) / scale
            products.append((stacked @ stacked.T / value.numel()).numpy())
            entries.append(value.numel())
    return np.array(products), np.array(entries, dtype=np.float64)


def minimum_norm(statistics: Statistics) -> np.ndarray:
    """The weights of sum 1 that minimize the norm of the combination, shape (m,).

    Since the product of θ and the noise is zero only on average, an error of about √((m - 1) / N) remains for N entries.
    """
    products, entries = statistics
    gram = np.tensordot(entries, products, axes=1)
    solved = np.linalg.lstsq(gram, np.ones(len(gram)), rcond=None)[0]
    return np.asarray(solved / solved.sum())


def distances(statistics: Statistics) -> np.ndarray:
    """Squared distances between copies, shape (m, m), averaged over all tensors with noise, each of mean 1."""
    products, entries = statistics
    squares = np.einsum("tjj->tj", products)
    apart = np.maximum(squares[:, :, None] + squares[:, None, :] - 2 * products, 0)
    level = apart.mean(axis=(1, 2))
    noisy = level > 1e-12
    if not noisy.any():
        return np.asarray(apart.mean(axis=0))
    return np.asarray(np.average(apart[noisy] / level[noisy, None, None], axis=0, weights=entries[noisy]))


def harmonic_weights(statistics: Statistics) -> np.ndarray:
    """Weights proportional to 1/α_k, with α fitted to the distances between copies, shape (m,), m ≥ 3.

    For zero-sum noise of level σ, ‖Y_j - Y_k‖² / N = m/(m-1) [(a_j² + a_k²)(1 - 1/m) + 2 a_j a_k / m] with a = σα.
    """
    apart = distances(statistics)
    from scipy.optimize import least_squares

    count = len(apart)
    rows, columns = np.triu_indices(count, 1)

    def misfit(logarithms: np.ndarray) -> np.ndarray:
        a, b = np.exp(logarithms[rows]), np.exp(logarithms[columns])
        expected = count / (count - 1) * ((a**2 + b**2) * (1 - 1 / count) + 2 * a * b / count)
        return np.asarray(expected - apart[rows, columns])

    start = np.full(count, 0.5 * math.log(max(float(apart.mean()), 1e-300) / 2))
    a = np.exp(least_squares(misfit, start, xtol=1e-15, ftol=1e-15, gtol=1e-15).x)
    return np.asarray((1 / a) / (1 / a).sum())


def known_scales(statistics: Statistics, scales: Sequence[float]) -> np.ndarray:
    """Lagrange weights for copies θ + x_k ε, in the order of the scales that fits the distances best, shape (m,)."""
    apart, products = distances(statistics), np.tensordot(statistics[1], statistics[0], axes=1)
    ranked = []
    for order in sorted(set(permutations(scales))):
        x = np.array(order)
        expected = (x[:, None] - x) ** 2
        misfit = float(np.abs(expected * (apart.sum() / expected.sum()) - apart).max() / (apart.max() or 1.0))
        weights = extrapolated(list(order)).weights
        ranked.append((round(misfit, 2), float(weights @ products @ weights), weights))
    return min(ranked, key=lambda candidate: candidate[:2])[2]
