"""The weights of a model in memory, as attacks and scores handle them, and their split into pieces with one role per axis.

An attack compares tensors of several models. A fused weight, such as phi3's qkv_proj, mixes several roles on one axis,
so it is first split into its parts; attacks then need no code of their own for any model family.

Weights are held in memory, in float32 (float64 if the checkpoint has it): 4 bytes per weight and model. Not covered:
models that do not fit.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture, TensorRole
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import PlanError

Weights = dict[str, torch.Tensor]
"""The tensors of one model by name, float32 or float64, without constants and without a tied LM head."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A weight, or one part of a fused weight."""

    template: str
    """Name of its tensor in the family's table."""
    part: int
    """Which part of the fused axis; 0 if the weight is not fused."""
    roles: tuple[str, ...]
    """The role of each axis."""
    layer: int | None
    expert: int | None
    value: torch.Tensor


@dataclass(frozen=True, eq=False)
class Model:
    """The weights of a model, with its architecture."""

    architecture: Architecture
    weights: Weights

    @classmethod
    def read(cls, path: str | Path) -> "Model":
        """Reads a checkpoint directory.

        Raises:
            CheckpointError: it cannot be read.
            UnsupportedModelError: its family or number format is not supported.
        """
        checkpoint = Checkpoint(path)
        architecture = Architecture.of(checkpoint)
        names = architecture.tensor_roles(checkpoint)
        return cls(architecture, {name: _computable(checkpoint.read(name)) for name in names})

    def role(self, name: str) -> TensorRole:
        """The role of one of its tensors."""
        role = self.architecture.role_of(name)
        assert role is not None
        return role

    def pieces(self) -> dict[tuple[str, int, int | None, int | None], Piece]:
        """All weights, split so that every axis has a single role, by (template, part, layer, expert).

        The pieces are views of the weights.
        """
        found = {}
        for name, value in self.weights.items():
            for piece in _split(self.architecture, self.role(name), value):
                found[piece.template, piece.part, piece.layer, piece.expert] = piece
        return found


def check_alike(models: Mapping[str, Model]) -> None:
    """Checks that all models have the same tensors and shapes, and finite weights.

    Args:
        models: name of each model, for error messages → the model; at least one.

    Raises:
        PlanError: two of them differ, or a weight is infinite or NaN.
    """
    (first, expected), *others = models.items()
    for name, model in models.items():
        for key, value in model.weights.items():
            if not bool(torch.isfinite(value).all()):
                raise PlanError(f"{name}: {key} has infinite or NaN entries, expected finite ones; give intact models")
    for name, model in others:
        shapes = {key: tuple(value.shape) for key, value in model.weights.items()}
        for key, value in expected.weights.items():
            if shapes.pop(key, None) != tuple(value.shape):
                raise PlanError(
                    f"{name}: lacks {key} of shape {list(value.shape)}, which {first} has; an audit compares models of "
                    "one architecture, so give a model and copies that were published from it"
                )
        if shapes:
            raise PlanError(f"{name}: has {min(shapes)}, which {first} lacks; give copies of one model")


def rms(value: torch.Tensor) -> float:
    """The root mean square of a tensor's entries; 0 if it has none."""
    return float(value.double().square().mean().sqrt()) if value.numel() else 0.0


def norm(tensors: Iterable[torch.Tensor]) -> float:
    """The Euclidean norm over all entries of some tensors, accumulated in float64."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors))


def _computable(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _split(architecture: Architecture, role: TensorRole, value: torch.Tensor) -> list[Piece]:
    """The pieces of one weight. At most one of its axes is fused."""
    heads = architecture.heads
    for axis, roles in enumerate(role.axes):
        if roles == ("qkv",):
            rest = value.shape[axis + 1 :]
            by_head = value.reshape(*value.shape[:axis], heads.count, 3, heads.dim, *rest)
            values = [by_head.select(axis + 1, part).flatten(axis, axis + 1) for part in range(3)]
            names: tuple[str, ...] = ("query", "key", "value")
        elif len(roles) > 1:
            sizes = [architecture.size((part,), role.expert is not None) for part in roles]
            values, names = list(torch.split(value, sizes, axis)), roles
        else:
            continue
        before, after = [a[0] for a in role.axes[:axis]], [a[0] for a in role.axes[axis + 1 :]]
        return [
            Piece(role.template, part, (*before, name, *after), role.layer, role.expert, piece)
            for part, (name, piece) in enumerate(zip(names, values, strict=True))
        ]
    return [Piece(role.template, 0, tuple(axis[0] for axis in role.axes), role.layer, role.expert, value)]
