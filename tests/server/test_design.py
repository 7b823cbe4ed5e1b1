import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.errors import PlanError
from mpunlearn.server.design import (
    CopyDesign,
    default_scales,
    extrapolated,
    harmonic,
    noise_free,
    single_copy,
    zero_sum_basis,
)

alphas = st.lists(st.floats(1, 4), min_size=2, max_size=6)


@given(alphas)
def test_harmonic_noise_has_the_covariance_of_the_paper(scales: list[float]) -> None:
    design, m = harmonic(scales), len(scales)
    alpha = np.array(scales)
    expected = np.outer(alpha, alpha) * m / (m - 1) * (np.eye(m) - 1 / m)
    assert np.allclose(design.coefficients @ design.coefficients.T, expected, atol=1e-12)
    assert np.allclose((design.coefficients / alpha[:, None]).sum(axis=0), 0, atol=1e-12)
    assert np.allclose(design.weights, (1 / alpha) / (1 / alpha).sum())
    assert design.draws == m - 1


@given(st.integers(1, 8))
def test_zero_sum_basis_is_orthonormal(m: int) -> None:
    basis = zero_sum_basis(m)
    assert np.allclose(basis.T @ basis, np.eye(m - 1), atol=1e-12)
    assert np.allclose(basis.sum(axis=0), 0, atol=1e-12)


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_extrapolation_cancels_every_order_below_the_number_of_copies(copies: int) -> None:
    design = extrapolated(default_scales(copies))
    x = design.coefficients[:, 0]
    for order in range(1, copies):
        assert abs(design.weights @ x**order) < 1e-12
    assert abs(design.weights @ x**copies) > 0.1


def test_extrapolation_of_two_opposite_copies_is_the_harmonic_average() -> None:
    assert np.allclose(extrapolated([1.0, -1.0]).weights, harmonic([1.0, 1.0]).weights)


def test_designs_that_do_not_cancel_are_refused() -> None:
    good = harmonic([1.0, 1.5, 2.0])
    with pytest.raises(ValueError, match="cancel"):
        CopyDesign(good.coefficients, np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="sum"):
        CopyDesign(good.coefficients, good.weights * 2)


@given(alphas, st.data())
def test_floor_is_the_formula_where_the_covariance_inverts_and_zero_for_all_copies(scales: list[float], data) -> None:
    design, m = harmonic(scales), len(scales)
    assert design.floor(list(range(m))) < 1e-9
    subset = sorted(data.draw(st.sets(st.integers(0, m - 1), min_size=1, max_size=m - 1)))
    covariance = design.coefficients[subset] @ design.coefficients[subset].T
    ones = np.ones(len(subset))
    assert design.floor(subset) == pytest.approx(1 / (ones @ np.linalg.inv(covariance) @ ones), rel=1e-6)


def test_floor_of_the_other_designs() -> None:
    assert single_copy().floor([0]) == 1
    assert noise_free(2).floor([0]) == 0
    assert extrapolated([1.0, -1.0, 2.0]).floor([0, 1]) == 0  # on a line, any two copies reveal it
    assert extrapolated([1.0, -1.0, 2.0]).floor([2]) == pytest.approx(4)


@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_bad_alphas(scales: list[float]) -> None:
    with pytest.raises(PlanError):
        harmonic(scales)


@pytest.mark.parametrize("scales", [[1.0], [1.0, 1.0], [0.0, 1.0]])
def test_bad_scales(scales: list[float]) -> None:
    with pytest.raises(PlanError):
        extrapolated(scales)
