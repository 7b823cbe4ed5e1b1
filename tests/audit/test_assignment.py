"""What audits need of scipy, written in numpy: both must give the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares, linear_sum_assignment

from mpunlearn.audit.assignment import assign
from mpunlearn.audit.attacks.cancel import harmonic_weights


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


@given(st.integers(0, 2**32 - 1), st.integers(3, 8))
def test_noise_scales_are_fitted_as_scipy_fits_them(seed: int, copies: int) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=(copies, 400))
    values = random.uniform(0.5, 2, (copies, 1)) * (values - values.mean(axis=0))
    products = (values @ values.T / 400)[None]
    apart = (np.diag(products[0])[:, None] + np.diag(products[0]) - 2 * products[0]) / 1.0
    apart = apart / apart.mean()
    rows, columns = np.triu_indices(copies, 1)

    def misfit(logarithms: np.ndarray) -> np.ndarray:
        a, b = np.exp(logarithms[rows]), np.exp(logarithms[columns])
        expected = copies / (copies - 1) * ((a**2 + b**2) * (1 - 1 / copies) + 2 * a * b / copies)
        return expected - apart[rows, columns]

    start = np.full(copies, 0.5 * np.log(apart.mean() / 2))
    a = np.exp(least_squares(misfit, start, xtol=1e-15, ftol=1e-15, gtol=1e-15).x)
    assert harmonic_weights((products, np.array([400.0]))) == pytest.approx((1 / a) / (1 / a).sum(), rel=1e-6)
