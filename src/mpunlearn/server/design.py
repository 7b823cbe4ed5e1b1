"""Copy designs: which noise each copy carries, and with which weights the updates are averaged.

The idea: a design is two small arrays, coefficients A (m copies x D independent draws) and weights w (m). Copy k publishes
θ + σ Σ_d A_kd z_d, and the server aggregates Σ_k w_k Δ_k. Since Σ w = 1, a common update passes unchanged; since wᵀA = 0, the
first-order effect of the noise cancels. Noise, aggregation and the disclosure floor use nothing else, so a new design is a
function of a few lines.

Symbols are the paper's (Wang et al., arXiv 2602.23798): m copies, α_k the secret scale of copy k. Extrapolated denoising is
zero-noise extrapolation: Lagrange's weights at zero cancel every order up to m-1, harmonic weights only the first.
"""

from dataclasses import dataclass

import numpy as np

from mpunlearn.errors import PlanError

TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class CopyDesign:
    """Coefficients of the noise and weights of the aggregation.

    Raises:
        ValueError: the shapes do not fit, the weights do not sum to one, or the noise of several copies does not cancel.
    """

    coefficients: np.ndarray
    """A, shape (m, D), float64, in units of σ."""
    weights: np.ndarray
    """w, shape (m,), float64."""

    def __post_init__(self) -> None:
        copies = len(self.weights)
        if self.coefficients.ndim != 2 or len(self.coefficients) != copies:
            raise ValueError(f"{copies} weights, but coefficients of shape {self.coefficients.shape}")
        size = np.abs(self.weights).sum()
        if not abs(self.weights.sum() - 1) <= TOLERANCE * size:
            raise ValueError(f"the weights sum to {self.weights.sum()}, expected 1")
        largest = np.abs(self.coefficients).max(initial=0.0)
        if copies > 1 and not np.abs(self.weights @ self.coefficients).max(initial=0.0) <= TOLERANCE * size * largest:
            raise ValueError("the weighted noise does not cancel to first order")

    @property
    def copies(self) -> int:
        """M."""
        return len(self.weights)

    @property
    def draws(self) -> int:
        """D."""
        return int(self.coefficients.shape[1])

    def floor(self, subset: list[int]) -> float:
        """Variance, in units of σ², of the noise left after the best unbiased linear attack on some copies.

        min_v vᵀ A_S A_Sᵀ v over vectors with Σ v = 1. That is 1 / (1ᵀ (A_S A_Sᵀ)⁻¹ 1) if the inverse exists, and 0 if some
        combination of the copies is free of noise. It assumes that the copies have been aligned to one another.

        Args:
            subset: numbers of the copies, from 0.
        """
        rows = self.coefficients[subset]
        # v = 1/n + B t, where B is a basis of the vectors that sum to zero: a least-squares problem in t.
        basis = zero_sum_basis(len(subset))
        mean = rows.mean(axis=0)
        t = np.linalg.lstsq((basis.T @ rows).T, -mean, rcond=None)[0]
        left = float(np.square(mean + t @ (basis.T @ rows)).sum())
        return 0.0 if left < 1e-12 else left


def harmonic(alphas: list[float]) -> CopyDesign:
    """The paper's design: zero-sum noise scaled by α_k, and weights proportional to 1/α_k (Algorithm 1).

    The zero-sum noise √(m/(m-1)) (z_k - z̄) has the same distribution as √(m/(m-1)) B z with B an orthonormal basis of the
    vectors that sum to zero, which needs m-1 draws instead of m.

    Args:
        alphas: α_1 … α_m, each at least 1, m ≥ 2.
    """
    scales = np.asarray(alphas, dtype=np.float64)
    copies = len(scales)
    if copies < 2:
        raise PlanError(f"harmonic denoising needs at least 2 copies, found {copies}")
    if not np.all(np.isfinite(scales)) or np.any(scales < 1):
        raise PlanError(f"--alphas: every α must be at least 1, found {', '.join(f'{a:g}' for a in scales)}")
    coefficients = np.sqrt(copies / (copies - 1)) * scales[:, None] * zero_sum_basis(copies)
    return CopyDesign(coefficients, (1 / scales) / (1 / scales).sum())


def extrapolated(scales: list[float]) -> CopyDesign:
    """One draw ε, copies at θ + x_k ε, and Lagrange's weights at zero: orders 1 … m-1 of the noise cancel.

    Args:
        scales: x_1 … x_m, distinct and none zero, m ≥ 2.
    """
    x = np.asarray(scales, dtype=np.float64)
    if len(x) < 2 or len(set(x)) < len(x) or np.any(x == 0) or not np.all(np.isfinite(x)):
        raise PlanError(f"extrapolation needs at least 2 distinct scales other than 0, found {list(scales)}")
    weights = np.array([np.prod([-b / (a - b) for j, b in enumerate(x) if j != k]) for k, a in enumerate(x)])
    return CopyDesign(x[:, None], weights)


def default_scales(copies: int) -> list[float]:
    """Scales for `extrapolated` that keep both the noise and the weights small.

    Raises:
        PlanError: there are more than 4 copies, for which nothing was measured.
    """
    known = {2: [1.0, -1.0], 3: [1.0, -1.0, 2.0], 4: [1.0, -1.0, 0.5**0.5, -(0.5**0.5)]}
    if copies not in known:
        raise PlanError(f"--denoising extrapolate: expected 2, 3 or 4 copies, found --copies {copies}")
    return known[copies]


def single_copy() -> CopyDesign:
    """The single noisy copy, the baseline for the other designs: nothing cancels."""
    return CopyDesign(np.ones((1, 1)), np.ones(1))


def noise_free(copies: int = 1) -> CopyDesign:
    """No noise at all, and a plain mean."""
    return CopyDesign(np.zeros((copies, 0)), np.full(copies, 1 / copies))


def zero_sum_basis(copies: int) -> np.ndarray:
    """Orthonormal columns orthogonal to the ones vector, shape (copies, copies - 1) (Helmert's matrix)."""
    basis = np.zeros((copies, copies - 1))
    for column in range(1, copies):
        basis[:column, column - 1] = 1
        basis[column, column - 1] = -column
        basis[:, column - 1] /= np.sqrt(column * (column + 1))
    return basis
