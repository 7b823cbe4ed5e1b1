"""Alignment finds the maps that were planted, in every family, without noise and with the noise of two copies."""

import dataclasses

import pytest
import torch
from tests.architecture.test_families import VARIANTS, build, publish

from mpunlearn.audit.alignment import Alignment, align
from mpunlearn.audit.weights import Model, norm
from mpunlearn.server.reparameterization import Reparameterization
from mpunlearn.server.secret import Secret

SECRET = Secret(b"k" * 32)


def models(variant: str, strength: str = "full", kappa: float = 0.0, seed: int = 0) -> tuple[Model, Model, Model]:
    """A model, a noisy version θ + ε of it, and a copy T(θ - ε): zero-sum noise, as that of two copies."""
    _, architecture, weights = build(variant)
    random = torch.Generator().manual_seed(seed)
    noise = {
        name: kappa * value.square().mean().sqrt() * torch.randn(value.shape, generator=random, dtype=value.dtype)
        for name, value in weights.items()
    }
    maps = Reparameterization(architecture, strength, SECRET, 1, seed)
    copy = publish(architecture, maps, {name: value - noise[name] for name, value in weights.items()})
    noisy = {name: value + noise[name] for name, value in weights.items()}
    return Model(architecture, weights), Model(architecture, noisy), Model(architecture, copy)


def distance(one: Model, other: Model) -> float:
    """Relative to the norm of the first."""
    return norm(other.weights[name] - value for name, value in one.weights.items()) / norm(one.weights.values())


@pytest.mark.parametrize("strength", ["full", "paper", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_planted_maps_are_recovered(variant: str, strength: str) -> None:
    theta, _, copy = models(variant, strength)
    assert strength == "none" or distance(theta, Alignment(theta.architecture).aligned(copy)) > 0.1
    assert distance(theta, align(theta, copy).aligned(copy)) < 1e-10


@pytest.mark.parametrize("kappa", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_between_two_noisy_copies_only_their_noise_remains(kappa: float, seed: int) -> None:
    theta, noisy, copy = models("llama", kappa=kappa, seed=seed)
    aligned = align(noisy, copy).aligned(copy)
    assert distance(noisy, aligned) < 2.1 * kappa
    middle = {name: (value + noisy.weights[name]) / 2 for name, value in aligned.weights.items()}
    assert distance(theta, dataclasses.replace(theta, weights=middle)) < 0.2 * kappa
