"""RepSelect's collapse of a gradient, and the step that it belongs to."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.client.training import distance, update_of

from mpunlearn.client import collapse
from mpunlearn.client.collapse import collapsed
from mpunlearn.client.combine import COMBINATIONS
from mpunlearn.client.resources import Resources
from mpunlearn.client.trainer import check_resources
from mpunlearn.errors import PlanError
from mpunlearn.protocol.objectives import OBJECTIVES
from mpunlearn.protocol.plan import Training

matrices = st.tuples(st.integers(4, 20), st.integers(4, 20), st.integers(0, 99))
SGD = {"objective": "repselect", "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}


def random_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(matrices, st.integers(1, 2))
@settings(deadline=None, max_examples=40)
def test_what_is_removed_is_gone_and_the_rest_is_untouched(shape, components: int) -> None:
    matrix = random_matrix(*shape)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    result = collapsed(matrix, components, soft=False).double()
    assert float((u[:, :components].mT @ result).abs().max()) < 1e-4
    assert float((result @ vh[:components].mT).abs().max()) < 1e-4
    rest = (u[:, components:] * s[components:]) @ vh[components:]
    assert torch.allclose(result, rest, atol=1e-4)


@given(matrices, st.integers(1, 2), st.floats(0.1, 1e4))
@settings(deadline=None, max_examples=40)
def test_damping_leaves_the_square_of_the_least_collapsed_value_over_each(shape, components: int, scale) -> None:
    matrix = random_matrix(*shape)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s[:components] = s[components - 1] ** 2 / s[:components]
    result = collapsed(scale * matrix, components, soft=True)  # a scaled loss, as with float16, changes nothing
    assert torch.allclose(result.double() / scale, (u * s) @ vh, atol=1e-4)
    if components == 1:
        assert torch.allclose(result / scale, matrix, atol=1e-5)


@pytest.mark.parametrize("soft", [True, False])
def test_nothing_is_collapsed_where_there_is_nothing_to_collapse(soft: bool) -> None:
    matrix = random_matrix(6, 9, 0)
    assert collapsed(matrix, 0, soft) is matrix
    outer = torch.outer(torch.arange(4.0), torch.arange(5.0))  # of rank one
    for given_matrix in (torch.zeros(4, 5), outer, torch.full((4, 5), float("inf")), torch.full((4, 5), float("nan"))):
        assert collapsed(given_matrix, 3, soft) is given_matrix


@pytest.mark.parametrize("soft", [True, False])
def test_at_most_half_of_the_rank_is_collapsed_and_experts_are_separate(soft: bool) -> None:
    low = random_matrix(12, 4, 0) @ random_matrix(4, 9, 1)
    experts = torch.stack((low, random_matrix(12, 9, 2)))
    result = collapsed(experts, 512, soft)
    assert torch.equal(result[0], collapsed(low, 2, soft))
    assert torch.equal(result[1], collapsed(experts[1], 4, soft))
    assert collapsed(experts.bfloat16(), 2, soft).dtype == torch.bfloat16


def test_the_randomized_decomposition_agrees_and_leaves_the_random_state_alone(monkeypatch) -> None:
    u, _ = torch.linalg.qr(random_matrix(80, 60, 0))
    v, _ = torch.linalg.qr(random_matrix(60, 60, 1))
    matrix = (u * 0.8 ** torch.arange(60)) @ v.mT
    exact = collapsed(matrix, 5, soft=True)
    monkeypatch.setattr(collapse, "EXACT", 10)
    before = torch.get_rng_state()
    assert torch.allclose(collapsed(matrix, 5, soft=True), exact, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_collapses_the_forget_gradient_only(save_tiny, tmp_path: Path, examples) -> None:
    """One step of SGD on all examples at once: the update is the collapsed gradient, plus the retain gradient."""
    path, options = save_tiny(), {"batch_size": 6, "epochs": 1, **SGD}
    plain = update_of(path, examples, tmp_path / "plain", **{**options, "objective": "grad-ascent"})
    retain = update_of(path, examples, tmp_path / "retain", **{**options, "objective": "grad-diff", "gamma": 0.0})
    for soft in (0, 1):
        parameters = {"components": 3, "soft": soft}
        alone = update_of(path, examples, tmp_path / f"a{soft}", **options, parameters=parameters)
        both = update_of(path, examples, tmp_path / f"b{soft}", **options, parameters=parameters, alpha=1.0)
        for name, gradient in plain.items():
            expected = collapsed(gradient, 3, bool(soft)) if gradient.dim() > 1 else torch.zeros_like(gradient)
            assert torch.allclose(alone[name], expected, atol=1e-5), name
            assert torch.allclose(both[name], expected + retain[name], atol=1e-5), name


def test_without_components_it_is_gradient_ascent_on_the_matrices(save_tiny, tmp_path: Path, examples) -> None:
    path, options = save_tiny(), {**SGD, "batch_size": 6, "epochs": 1}
    none = update_of(path, examples, tmp_path / "none", **options, parameters={"components": 0})
    plain = update_of(path, examples, tmp_path / "plain", **{**options, "objective": "grad-ascent"})
    some = update_of(path, examples, tmp_path / "some", **options)
    matrices = [{name: value for name, value in each.items() if value.dim() > 1} for each in (none, plain, some)]
    assert distance(matrices[0], matrices[1]) == 0
    assert distance(matrices[0], matrices[2]) > 0.1


def test_what_it_does_not_support_is_refused(monkeypatch) -> None:
    with pytest.raises(PlanError, match="--lora-rank: not supported by repselect"):
        Training("repselect", lora_rank=2)
    with pytest.raises(PlanError, match="--soft: expected 0 or 1"):
        Training("repselect", parameters={"soft": 2})
    with pytest.raises(PlanError, match="--components: expected a number of at least 0"):
        Training("repselect", parameters={"components": -1})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlanError, match="repselect: not supported on several processes"):
        check_resources(Training("repselect"), Resources())


def test_every_combination_is_used() -> None:
    assert {objective.combine for objective in OBJECTIVES.values()} == set(COMBINATIONS)
