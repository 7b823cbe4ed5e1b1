"""The weights of a combination, computed from the copies' products alone, against the design that made the copies."""

import numpy as np
import pytest

from mpunlearn.audit.attacks.cancel import harmonic_weights, known_scales, minimum_norm
from mpunlearn.server.design import CopyDesign, extrapolated, harmonic

ALPHAS = [1.3, 1.9, 1.05, 1.6]


def statistics(design: CopyDesign, levels: tuple[float, ...] = (0.01, 0.1)) -> tuple[np.ndarray, np.ndarray]:
    """The expected products of copies of tensors of mean square 1, one for each noise level."""
    noise = design.coefficients @ design.coefficients.T
    return np.array([1 + level**2 * noise for level in levels]), np.full(len(levels), 1000.0)


@pytest.mark.parametrize("copies", [3, 4])
def test_harmonic_weights_follow_from_distances(copies: int) -> None:
    design = harmonic(ALPHAS[:copies])
    assert harmonic_weights(statistics(design)) == pytest.approx(design.weights, rel=1e-5)


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_the_combination_of_minimum_norm_is_free_of_noise(copies: int) -> None:
    design = harmonic(ALPHAS[:copies])
    assert minimum_norm(statistics(design)) == pytest.approx(design.weights, rel=1e-5)


@pytest.mark.parametrize("order", [[1.0, -1.0, 2.0], [2.0, 1.0, -1.0], [-1.0, 2.0, 1.0]])
def test_the_order_of_known_scales_is_found(order: list[float]) -> None:
    design = extrapolated(order)
    assert known_scales(statistics(design), [1.0, -1.0, 2.0]) == pytest.approx(design.weights)
