"""The arms of `claim.py`: the configurations of MPU that are compared, grouped in suites."""

from dataclasses import dataclass, field
from typing import Any

QUIET = (1.0, -1.0, 0.5**0.5, -(0.5**0.5))
"""Noise scales of four extrapolated copies, two of which carry less noise than in the paper's design."""
FREE, RETRAINED = "noise-free", "retrained"


@dataclass(frozen=True)
class Arm:
    """One configuration of unlearning."""

    name: str
    perturbation: dict[str, Any]
    base: bool = False
    """Whether the noise level is relative to the task vector instead of the weights."""
    rounds: int = 5
    training: dict[str, Any] = field(default_factory=dict)
    baseline: str = FREE
    """The arm that it is compared with."""
    eta: float = 1.0
    own_batches: bool = False
    """Whether each copy is trained with its own batch order."""


NOISE_FREE = {"copies": 1, "kappa": 0.0, "reparameterization": "none"}


def claim() -> list[Arm]:
    """The comparisons that test the paper's claim: numbers of copies and noise levels against noise-free unlearning."""
    arms = [Arm(FREE, NOISE_FREE), Arm(RETRAINED, {}), Arm("no noise, 3 copies", {"copies": 3, "kappa": 0.0})]
    for copies in (3, 1, 2, 4):
        for base in (True, False):
            for kappa in (0.1, 0.05, 0.01):
                of = "task vector" if base else "parameters"
                name = f"{kappa:.0%} of {of}, {'single copy' if copies == 1 else f'{copies} copies'}"
                arms.append(Arm(name, {"copies": copies, "kappa": kappa}, base))
    return arms


def causes() -> list[Arm]:
    """At a noise level of 10 % of the parameters: where the loss of quality comes from, and what reduces it."""
    paper = {"copies": 3, "kappa": 0.1}
    four = {"copies": 4, "kappa": 0.1, "denoising": "extrapolate"}
    arms = [
        Arm(FREE, NOISE_FREE),
        Arm("no noise, 3 copies", {"copies": 3, "kappa": 0.0}),
        Arm("paper's design", paper),
        Arm("α = 1", {**paper, "alphas": (1.0, 1.0, 1.0)}),
        Arm("no reparameterization", {**paper, "reparameterization": "none"}),
        Arm("paper's reparameterization", {**paper, "reparameterization": "paper"}),
        Arm("extrapolated, 3 copies", {**paper, "denoising": "extrapolate"}),
        Arm("extrapolated, 4 copies", four),
        Arm("extrapolated, 4 copies, x = ±1, ±1/√2", {**four, "alphas": QUIET}),
        Arm("paper's design, other batches for each copy", paper, own_batches=True),
        Arm("no noise, one round: Adam's state kept", NOISE_FREE, rounds=1),
        Arm("paper's design, η = 0.8", paper, eta=0.8),
        Arm("paper's design, η = 1.2", paper, eta=1.2),
    ]
    for rounds in (1, 2, 10):
        free = f"{FREE}, {rounds} rounds"
        arms += [Arm(free, NOISE_FREE, rounds=rounds, baseline=free)]
        arms += [Arm(f"paper's design, {rounds} rounds", paper, rounds=rounds, baseline=free)]
    tensor: dict[str, Any] = {"optimizer": "tensor_adam"}
    single = {"copies": 1, "kappa": 0.1}
    designs: dict[str, dict[str, Any]] = {
        "single copy": single,
        "paper's design": paper,
        "extrapolated, 4 copies": four,
    }
    for name, rounds, training, arm_designs in (
        ("TensorAdam", 5, tensor, {"no noise, 3 copies": {"copies": 3, "kappa": 0.0}, **designs}),
        ("TensorAdam, 10 rounds", 10, tensor, designs),
        ("Adam with ε 1e-2", 5, {"adam_epsilon": 1e-2, "learning_rate": 6e-3}, designs),
        ("SGD", 5, {"optimizer": "sgd", "learning_rate": 0.3}, designs),
    ):
        free = f"{FREE}, {name}"
        arms += [Arm(free, NOISE_FREE, rounds=rounds, training=training, baseline=free)]
        arms += [
            Arm(f"{design}, {name}", perturbation, rounds=rounds, training=training, baseline=free)
            for design, perturbation in arm_designs.items()
        ]
    return arms


def orders() -> list[Arm]:
    """How the deviation decreases with the noise level, without reparameterization."""
    arms = []
    for optimizer, training in (
        ("AdamW", {}),
        ("Adam with ε 1e-2", {"adam_epsilon": 1e-2, "learning_rate": 6e-3}),
        ("TensorAdam", {"optimizer": "tensor_adam"}),
        ("SGD", {"optimizer": "sgd", "learning_rate": 0.3}),
    ):
        free = f"{FREE}, {optimizer}"
        arms += [Arm(free, NOISE_FREE, training=training, baseline=free)]
        for kappa in (0.01, 0.02, 0.05, 0.1):
            for name, design in (
                ("single copy", {"copies": 1}),
                ("harmonic, 3 copies", {"copies": 3, "alphas": (1.0, 1.0, 1.0)}),
                ("extrapolated, 3 copies", {"copies": 3, "denoising": "extrapolate"}),
                ("extrapolated, 4 copies", {"copies": 4, "denoising": "extrapolate", "alphas": QUIET}),
            ):
                settings = {**design, "kappa": kappa, "reparameterization": "none"}
                arms += [Arm(f"{optimizer}, {name}, κ {kappa:.0%}", settings, training=training, baseline=free)]
    return arms


SUITES = {"claim": claim, "causes": causes, "orders": orders}
