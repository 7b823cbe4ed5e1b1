"""Every attack succeeds where its defense is off, and fails where it is on."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.audit.test_alignment import models

from mpunlearn import Perturbation, preprocess
from mpunlearn.audit.attacks.base import base
from mpunlearn.audit.attacks.cancel import cancel
from mpunlearn.audit.attacks.predictable import predictable
from mpunlearn.audit.attacks.rounding import rounding
from mpunlearn.audit.attacks.rounds import rounds
from mpunlearn.audit.attacks.shrink import shrink, shrunk_matrix
from mpunlearn.audit.score import score
from mpunlearn.audit.weights import Model, norm
from mpunlearn.server.lineage import open_offset
from mpunlearn.server.noise import block_of
from mpunlearn.server.secret import Secret
from mpunlearn.server.state import ServerState


def noisy(model: Model, level: float, seed: int = 0) -> Model:
    """The model with independent noise, relative to the RMS of each tensor."""
    random = torch.Generator().manual_seed(seed)
    weights = {
        name: value + level * value.square().mean().sqrt() * torch.randn(value.shape, generator=random).to(value.dtype)
        for name, value in model.weights.items()
    }
    return Model(model.architecture, weights)


def test_the_public_base_undoes_the_reparameterization() -> None:
    theta, _, copy = models("llama")
    public = noisy(theta, 0.05)
    assert score(theta, copy, in_place=True).error > 0.5
    found = base(copy, public)
    assert score(theta, found, public).error < 1e-6
    assert score(theta, found, in_place=True).error < 0.05  # rotations are only as close as the base is


def test_two_of_three_copies_stay_above_their_floor() -> None:
    theta, *_ = models("llama")
    first, second = noisy(theta, 0.1, seed=1), noisy(theta, 0.1, seed=2)
    (found,) = cancel([first, second], whole=False).values()
    assert score(theta, found).error == pytest.approx(0.1 / math.sqrt(2), rel=0.06)


@pytest.mark.parametrize("count", [2, 5])
def test_rounds_average_fresh_noise_and_keep_common_noise(count: int) -> None:
    theta, *_ = models("llama")
    fresh = rounds([noisy(theta, 0.1, seed) for seed in range(count)])
    assert score(theta, fresh).error == pytest.approx(0.1 / math.sqrt(count), rel=0.05)
    stand_in = noisy(theta, 0.1, seed=99)
    common = rounds([noisy(stand_in, 0.02, seed) for seed in range(count)])
    expected = math.hypot(0.1, 0.02 / math.sqrt(count))
    assert score(theta, common).error == pytest.approx(expected, rel=0.05)


def test_rounding_undoes_noise_below_the_grid_and_no_other() -> None:
    theta, *_ = models("llama")
    stored = rounding(theta, torch.bfloat16)
    shares = [
        score(stored, rounding(noisy(stored, level), torch.bfloat16), in_place=True).equal_float32
        for level in (0.0, 1e-4, 0.1)
    ]
    assert shares[0] == 1.0
    assert shares[1] > 0.9
    assert shares[2] < 0.1


@pytest.mark.parametrize("scope", ["all", "layers"])
@pytest.mark.parametrize("floor", ["none", "grid"])
def test_a_known_key_gives_the_model_and_another_does_not(save_tiny, tmp_path: Path, scope: str, floor: str) -> None:
    path = save_tiny(model_type="mixtral", num_local_experts=3)
    perturbation = Perturbation(
        copies=3, kappa=0.1, noise_scope=scope, noise_floor=floor, common_noise=0.1, common_noise_shape="gauss"
    )
    copies = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=perturbation).copies
    state, theta = ServerState(tmp_path / "s"), Model.read(path)
    record = state.rounds[0]
    offset = open_offset(record.offset)
    for number, copy in enumerate(copies):
        found = predictable(Model.read(copy), number, state.secret, record, offset)
        assert score(theta, found, in_place=True).error < 1e-5
    wrong = predictable(Model.read(copies[0]), 0, Secret(b"x" * 32), record, offset)
    assert score(theta, wrong, in_place=True).error > 0.5


def low_rank(rank: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of a rank, of RMS about 1, and the same with noise."""
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, rank, generator=random, dtype=torch.float64) for size in (80, 60))
    value = left @ right.T / math.sqrt(rank)
    return value, value + noise * torch.randn(80, 60, generator=random, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 8), noise=st.floats(0.05, 2.0), seed=st.integers(0, 99))
def test_shrinking_removes_error_at_low_rank(rank: int, noise: float, seed: int) -> None:
    value, found = low_rank(rank, noise, seed)
    before, after = (found - value).norm(), (shrunk_matrix(found, noise) - value).norm()
    assert after < 0.8 * before
    if rank == 1:
        assert after < 0.4 * before
    assert torch.allclose(shrunk_matrix(found.T, noise), shrunk_matrix(found, noise).T, atol=1e-9)


def with_noise_of_blocks(theta: Model, change: dict[str, torch.Tensor], level: float) -> Model:
    """θ with noise of one standard deviation per block, relative to the RMS of `change` in that block."""
    random, blocks = torch.Generator().manual_seed(0), {}
    for name, value in change.items():
        blocks.setdefault(block_of(name, theta.role(name)), []).append(value)
    scale = {block: norm(values) / sum(value.numel() for value in values) ** 0.5 for block, values in blocks.items()}
    weights = {
        name: value
        + level * scale[block_of(name, theta.role(name))] * torch.randn(value.shape, generator=random).double()
        for name, value in theta.weights.items()
    }
    return Model(theta.architecture, weights)


def test_shrinking_removes_noise_from_a_task_vector_of_low_rank_and_none_from_random_weights() -> None:
    public, *_ = models("llama")
    change = {
        name: torch.outer(value[:, 0], value[0]) if value.dim() == 2 else torch.zeros_like(value)
        for name, value in public.weights.items()
    }
    tuned = Model(public.architecture, {name: value + change[name] for name, value in public.weights.items()})
    random = score(public, shrink(with_noise_of_blocks(public, public.weights, 0.1), 0.1), in_place=True)
    assert random.error > 0.095
    found = with_noise_of_blocks(tuned, change, 0.5)
    plain = score(tuned, found, public, in_place=True)
    assert plain.task_error == pytest.approx(0.5, rel=0.1)
    shrunk = score(tuned, shrink(found, 0.5, public), public, in_place=True)
    assert shrunk.task_error < 0.5 * plain.task_error
