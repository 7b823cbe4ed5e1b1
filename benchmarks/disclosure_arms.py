"""The worlds and the arms of `disclosure.py`: on what, and how copies are published."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mpunlearn import Perturbation
from mpunlearn.demo.models import TrainedWorld, trained_world
from mpunlearn.presets import PRESETS
from mpunlearn.server.offset import Shape
from tofu_world import tofu_world

KAPPA = 0.05


@dataclass(frozen=True)
class World:
    """A trained model and its data."""

    name: str
    models: TrainedWorld
    learning_rate: float
    """Of unlearning, for every objective and arm."""


def worlds(seed: int, names: list[str], tofu: Path | None) -> Iterator[World]:
    """The worlds of a seed: the built-in benchmark, and the small TOFU model if there is TOFU."""
    if "toy" in names:
        yield World("toy", trained_world(seed), 1e-3)
    if "tofu" in names and tofu is not None:
        yield World("tofu", tofu_world(tofu, seed), 4e-4)


@dataclass(frozen=True)
class Arm:
    """One way of publishing copies."""

    design: str
    """What the arms of one line in the figure have in common."""
    perturbation: Perturbation
    rounds: int = 1
    epochs: int = 10
    eta: float = 1.0
    """Server step size."""


def free() -> Arm:
    """Noise-free unlearning: the reference."""
    return Arm("noise-free", Perturbation(copies=1, kappa=0.0, common_noise=0), rounds=5, epochs=2)


def paper() -> Arm:
    """MPU as published."""
    return Arm("paper", Perturbation(copies=3, kappa=KAPPA, common_noise=0), rounds=5, epochs=2)


def single(level: float, shape: Shape) -> Arm:
    """One copy, published once, with common noise of a fixed level."""
    perturbation = Perturbation(copies=1, kappa=0.0, common_noise=level, common_noise_shape=shape)
    return Arm(f"{shape}, one copy", perturbation)


def preset(name: str, eta: float = 1.0, epochs: int | None = None) -> Arm:
    """The arm of a preset, with the calibrated level."""
    values = dict(PRESETS[name])
    rounds, usual = values.pop("rounds"), values.pop("epochs")
    design = f"whitened, {'one copy' if values['copies'] == 1 else 'three copies'}{', longer' if epochs else ''}"
    return Arm(design, Perturbation(**values), rounds, epochs or usual, eta)


ARMS: dict[str, Callable[[], Arm]] = {
    "noise-free": free,
    "noise-free, 1 round": lambda: Arm("noise-free", Perturbation(copies=1, kappa=0.0, common_noise=0)),
    "paper, κ 5 %": paper,
    "gauss 10 %": lambda: single(0.1, "gauss"),
    "gauss 20 %": lambda: single(0.2, "gauss"),
    "whitened 20 %": lambda: single(0.2, "whitened"),
    "hardened": lambda: preset("hardened"),
    "lean": lambda: preset("lean"),
    "lean, η 1.1, 12 epochs": lambda: preset("lean", 1.1, 12),
}
