"""Copy designs: how much of which noise each copy carries, and the weights with which the updates are averaged.

In each round of MPU, the server publishes m noisy copies of its model θ, and later averages the updates Δ_1 … Δ_m that
were trained on them. The idea: a design describes both steps by two small arrays, noise coefficients A (m copies x D
independent draws) and averaging weights w (m). Copy k is θ + σ Σ_d A_kd z_d with standard normals z_d, and the server
aggregates Σ_k w_k Δ_k. Because Σ_k w_k = 1, an update common to all copies passes unchanged; because wᵀA = 0, the
first-order effect of the noise cancels. Noise, aggregation and the disclosure bound (`floor`) need nothing else, so a
new design takes only a few lines.

Symbols follow the paper (Wang et al., arXiv 2602.23798): α_k is the secret noise scale of copy k. The paper's harmonic
weights cancel the first order of the noise. Extrapolated denoising (zero-noise extrapolation) uses Lagrange weights at
zero, which cancel all orders up to m-1.
"""

from dataclasses import dataclass

import numpy as np

from mpunlearn.errors import PlanError

TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class CopyDesign:
    """Noise coefficients and averaging weights.

    Raises:
        ValueError: the shapes do not match, the weights do not sum to one, or (with several copies) the noise does not
            cancel.
    """

    coefficients: np.ndarray
    """A, shape (m, D), float64, in units of σ."""
    weights: np.ndarray
    """w, shape (m,), float64."""

    def __post_init__(self) -> None:
        copies = len(self.weights)
        if self.coefficients.ndim != 2 or len(self.coefficients) != copies:
            raise ValueError(f"{copies} weights do not match coefficients of shape {self.coefficients.shape}")
        size = np.abs(self.weights).sum()
        if not abs(self.weights.sum() - 1) <= TOLERANCE * size:
            raise ValueError(f"the weights sum to {self.weights.sum()}, expected 1")
        largest = np.abs(self.coefficients).max(initial=0.0)
        if copies > 1 and not np.abs(self.weights @ self.coefficients).max(initial=0.0) <= TOLERANCE * size * largest:
            raise ValueError("the weighted noise does not cancel to first order")

    @property
    def copies(self) -> int:
        """Number m of copies."""
        return len(self.weights)

    @property
    def draws(self) -> int:
        """Number D of independent noise draws."""
        return int(self.coefficients.shape[1])

    def floor(self, subset: list[int]) -> float:
        """Variance of the noise that remains after the best linear unbiased attack on some copies, in units of σ².

        The attacker combines the copies of the subset S with weights v that sum to one. The minimum of vᵀ A_S A_Sᵀ v
        over v is 1 / (1ᵀ (A_S A_Sᵀ)⁻¹ 1) if the inverse exists, and 0 if some combination is free of noise. This
        assumes that the attacker has already aligned the copies with one another, that is, undone their
        reparameterizations.

        Args:
            subset: indices of the copies, starting at 0.
        """
        rows = self.coefficients[subset]
        # With v = 1/n + B t, where B is a basis of the vectors that sum to zero, this is a least-squares problem in t.
        basis = zero_sum_basis(len(subset))
        mean = rows.mean(axis=0)
        t = np.linalg.lstsq((basis.T @ rows).T, -mean, rcond=None)[0]
        left = float(np.square(mean + t @ (basis.T @ rows)).sum())
        return 0.0 if left < 1e-12 else left


def harmonic(alphas: list[float]) -> CopyDesign:
    """The paper's design (Algorithm 1): zero-sum noise scaled by α_k, and weights proportional to 1/α_k.

    The zero-sum noise √(m/(m-1)) (z_k - z̄) has the same distribution as √(m/(m-1)) B z, where B is an orthonormal
    basis of the vectors that sum to zero; the latter needs m-1 draws instead of m.

    Args:
        alphas: α_1 … α_m, each at least 1, m ≥ 2.

    Raises:
        PlanError: there are fewer than 2 copies, or an α is below 1 or not finite.
    """
    scales = np.asarray(alphas, dtype=np.float64)
    copies = len(scales)
    if copies < 2:
        raise PlanError(f"--denoising harmonic: expected at least 2 copies, found {copies}")
    if not np.all(np.isfinite(scales)) or np.any(scales < 1):
        raise PlanError(f"--alphas: expected numbers of at least 1, found {', '.join(f'{a:g}' for a in scales)}")
    coefficients = np.sqrt(copies / (copies - 1)) * scales[:, None] * zero_sum_basis(copies)
    return CopyDesign(coefficients, (1 / scales) / (1 / scales).sum())


def extrapolated(scales: list[float]) -> CopyDesign:
    """Extrapolated denoising: one draw ε, copies θ + x_k ε, Lagrange weights at zero. Noise orders 1 … m-1 cancel.

    Args:
        scales: x_1 … x_m, distinct and nonzero, m ≥ 2.

    Raises:
        PlanError: there are fewer than 2 scales, or they are not distinct, nonzero and finite.
    """
    x = np.asarray(scales, dtype=np.float64)
    if len(x) < 2 or len(set(x)) < len(x) or np.any(x == 0) or not np.all(np.isfinite(x)):
        raise PlanError(f"--alphas: extrapolation needs at least 2 distinct nonzero scales, found {list(scales)}")
    weights = np.array([np.prod([-b / (a - b) for j, b in enumerate(x) if j != k]) for k, a in enumerate(x)])
    return CopyDesign(x[:, None], weights)


def default_scales(copies: int) -> list[float]:
    """Default scales for `extrapolated`, chosen to keep both the noise and the weights small.

    Raises:
        PlanError: there are no measured defaults for this number of copies.
    """
    known = {2: [1.0, -1.0], 3: [1.0, -1.0, 2.0], 4: [1.0, -1.0, 0.5**0.5, -(0.5**0.5)]}
    if copies not in known:
        raise PlanError(
            f"--denoising extrapolate: expected 2, 3 or 4 copies, found --copies {copies}; set --alphas for others"
        )
    return known[copies]


def single_copy() -> CopyDesign:
    """A single noisy copy, a baseline for the other designs: nothing cancels the noise."""
    return CopyDesign(np.ones((1, 1)), np.ones(1))


def noise_free(copies: int = 1) -> CopyDesign:
    """Copies without noise, averaged with equal weights."""
    return CopyDesign(np.zeros((copies, 0)), np.full(copies, 1 / copies))


def zero_sum_basis(copies: int) -> np.ndarray:
    """Orthonormal basis of the vectors that sum to zero, shape (copies, copies - 1) (Helmert matrix)."""
    basis = np.zeros((copies, copies - 1))
    for column in range(1, copies):
        basis[:column, column - 1] = 1
        basis[column, column - 1] = -column
        basis[:, column - 1] /= np.sqrt(column * (column + 1))
    return basis
