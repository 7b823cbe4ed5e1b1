"""What audits need of scipy, written in numpy: both must give the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares, linear_sum_assignment

from mpunlearn.audit.assignment import assign
from mpunlearn.audit.attacks.cancel import distances, fitted, harmonic_weights


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from([0.0, 1.0, 4.0]), st.booleans())
def test_assignment_is_optimal(seed: int, size: int, signal: float, ties: bool) -> None:
    random = np.random.default_rng(seed)
    score = random.normal(size=(size, size)) + signal * np.eye(size)[random.permutation(size)]
    if ties:
        score = np.round(score)
    found, expected = assign(score), linear_sum_assignment(score, maximize=True)[1]
    assert sorted(found) == list(range(size))
    rows = np.arange(size)
    assert score[rows, found].sum() == pytest.approx(score[rows, expected].sum(), abs=1e-9)
    if not ties:
        assert (found == expected).all()


@given(st.integers(0, 2**32 - 1), st.integers(3, 6), st.booleans())
def test_noise_scales_are_fitted_at_least_as_well_as_by_scipy(seed: int, copies: int, harmonic: bool) -> None:
    """Also where the noise is that of another design, and no scales fit."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(copies, 400))
    values = values - values.mean(axis=0) if harmonic else np.resize([1.0, -1.0, 2.0], (copies, 1)) * values[:1]
    values *= random.uniform(0.5, 2, (copies, 1))
    products = (values @ values.T / 400)[None]
    apart = distances((products, np.array([400.0])))
    rows, columns = np.triu_indices(copies, 1)

    def misfit(logarithms: np.ndarray) -> np.ndarray:
        a, b = np.exp(logarithms[rows]), np.exp(logarithms[columns])
        return copies / (copies - 1) * ((a**2 + b**2) * (1 - 1 / copies) + 2 * a * b / copies) - apart[rows, columns]

    start = np.full(copies, 0.5 * np.log(apart.mean() / 2))
    with np.errstate(all="ignore"):
        expected = least_squares(misfit, start, xtol=1e-15, ftol=1e-15, gtol=1e-15).x
    found = fitted(start, apart, rows, columns)
    assert np.square(misfit(found)).sum() <= np.square(misfit(expected)).sum() * (1 + 1e-4) + 1e-9
    if harmonic:
        a = np.exp(expected)
        assert harmonic_weights((products, np.array([400.0]))) == pytest.approx((1 / a) / (1 / a).sum(), rel=1e-4)
