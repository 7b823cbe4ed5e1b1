"""Validates the updates that clients send back, before any of their values are used.

An update is checked against the published copy that it was trained from: it may change only tensors that the copy has,
with the same shapes, finite values, and a norm no larger than the model's. Reparameterizations preserve names (up to
the order of experts), shapes and norms, so these checks need no secret.
"""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture, TensorRole
from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint, TensorDirectory
from mpunlearn.errors import PlanError, UpdateError
from mpunlearn.protocol.exchange import FACTORS, Card, ReceivedUpdate
from mpunlearn.protocol.plan import Training
from mpunlearn.storage import Place

NORM_LIMIT = 1.0
"""Maximum norm of an update, relative to the norm of the model. A larger update would replace the model."""
FACTOR_LIMIT = 1e15
"""Maximum norm of a LoRA factor. The product of two such factors stays within the range of float32 in any basis."""
CANCELLATION = 1e3
"""Maximum product of the norms of two LoRA factors, relative to the norm of the model. Beyond it, the factors cancel
each other, and in float32 their product depends on the basis."""
OVERHEAD_BYTES = 200_000
"""Maximum size of the parts of an update other than its tensors."""
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor, by name."""


def examine(
    path: Path, copy: Path, model: Path, card: Card, *, factored: bool, expected: Collection[str] | None = None
) -> Path:
    """Checks a received update against the copy that it should have been trained from.

    Args:
        path: directory of the update.
        copy: directory of the published copy.
        model: directory of the server's model θ. The norm of the update is compared with that of θ, because the noise
            changes the norm of the copy (the reparameterization does not).
        card: the expected card, which identifies the copy.
        factored: whether the plan asks for LoRA factors.
        expected: published names of the tensors that the update must change (default: any).

    Returns:
        `path`.

    Raises:
        UpdateError: it is not an update of that copy, has NaN or infinite values, or is too large.
    """
    update, published = ReceivedUpdate.open(path), Checkpoint(copy)
    if update.card != card:
        raise UpdateError(f"{path}: belongs to {update.card}; expected {card}")
    if update.weights:
        raise UpdateError(f"{path}: is a checkpoint or an adapter; expected an update")
    names = check_tensors(update, {name: (info.dtype, info.shape) for name, info in published.tensors.items()})
    if (split := _split_experts(names, Architecture.of(published))) is not None:
        raise UpdateError(f"{path}: changes {split}, but not that tensor of every expert of the layer")
    if expected is not None and (difference := sorted(names ^ set(expected))):
        raise UpdateError(
            f"{path}: changes {len(names)} tensors, but the plan trains {len(expected)}; the first "
            f"{'unexpected' if difference[0] in names else 'missing'} one is {difference[0]}"
        )
    if wrong := sorted(name for name in update.tensors.tensors if name.endswith(FACTORS) != factored):
        raise UpdateError(f"{path}: {wrong[0]} is {'not a' if factored else 'a'} LoRA factor, contrary to the plan")
    square = sum(_square(update.tensors, name) for name in sorted(names))
    if not math.isfinite(square):
        raise UpdateError(f"{path}: contains NaN or infinite values; train again")
    theta = Checkpoint(model)
    of_model = sum(_tensor_square(theta, name) for name in theta.tensors)
    for name in sorted(names) if factored else ():
        a, b = (_tensor_square(update.tensors, name + factor) for factor in FACTORS)
        if max(a, b) > FACTOR_LIMIT**2:
            raise UpdateError(
                f"{path}: a LoRA factor of {name} has a norm above {FACTOR_LIMIT:g}; it would overflow in another basis"
            )
        if a * b > CANCELLATION**2 * of_model:
            raise UpdateError(
                f"{path}: the LoRA factors of {name} cancel each other; their product would depend on the basis"
            )
    check_norm(path, square, of_model)
    return path


def check_norm(path: Place, square: float, of_model: float, tolerance: float = 0.0) -> None:
    """Checks that the norm of an update does not exceed the limit.

    Args:
        path: path of the update, for the error message.
        square: squared norm of the update.
        of_model: squared norm of θ.
        tolerance: relative tolerance of the limit. Sums in another basis round differently, and an update that was
            accepted once must not be rejected later.

    Raises:
        UpdateError: the norm exceeds `NORM_LIMIT` times that of the model.
    """
    limit = NORM_LIMIT * (1 + tolerance)
    if square > limit**2 * of_model:
        raise UpdateError(
            f"{path}: the update's norm is {math.sqrt(square / of_model):.3g} times the model's, expected at most "
            f"{NORM_LIMIT:g}; train with a smaller learning rate"
        )


def check_tensors(update: ReceivedUpdate, specs: Specs, names: Collection[str] | None = None) -> set[str]:
    """Checks the names, shapes and dtypes of an update against the tensors of the published copy.

    Args:
        update: the received update.
        specs: the tensors of the copy.
        names: names of the tensors to check (default: all).

    Returns:
        The published names of the tensors that the update changes.

    Raises:
        UpdateError: a tensor of the update does not match any tensor of the copy.
    """
    path, tensors = update.tensors.place, update.tensors.tensors
    counted = set(tensors if names is None else names)
    for factor in sorted(name for name in counted if name.endswith(FACTORS)):
        _check_factor(update, factor, specs)
    weights = {name for name in counted if not name.endswith(FACTORS)}
    factored = {name.removesuffix(FACTORS[0]) for name in counted if name.endswith(FACTORS[0])}
    if twice := sorted(weights & factored):
        raise UpdateError(f"{path}: contains both {twice[0]} and its LoRA factors; expected only one of them")
    for name in sorted(weights):
        if name not in specs:
            raise UpdateError(
                f"{path}: changes {name}, which the model does not have; expected the model's tensor names"
            )
        published, shape = specs[name]
        info = tensors[name]
        if info.shape != shape:
            raise UpdateError(f"{path}: {name} has shape {list(info.shape)}, expected {list(shape)}")
        if not info.dtype.is_floating_point:
            raise UpdateError(f"{path}: {name} has dtype {info.dtype}, expected floating point")
        if update.weights and torch.finfo(info.dtype).eps > torch.finfo(published).eps:
            raise UpdateError(
                f"{path}: {name} is stored as {info.dtype}, but the copy was published as {published}; rounding "
                f"would swamp the update, so save the trained model as {published}"
            )
    return weights | factored


def changed_tensors(path: Path) -> set[str]:
    """The published names of the tensors that an update changes."""
    names = ReceivedUpdate.open(path).tensors.tensors
    return {name[: -len(FACTORS[0])] if name.endswith(FACTORS) else name for name in names}


def planned_tensors(copy: Path, training: Training) -> set[str] | None:
    """The published names of the tensors that a plan trains; None if only the client's model determines them.

    That is so for the MoE models, whose experts transformers merges: a regular expression is then over other names than
    those on disk, and it depends on its version which weights are linear layers, the only ones that LoRA adapts.
    """
    checkpoint = Checkpoint(copy)
    architecture = Architecture.of(checkpoint)
    if architecture.experts and (training.lora_rank or training.train not in ("blocks", "all")):
        return None
    return trained_names(architecture, architecture.tensor_roles(checkpoint), training)


def trained_names(architecture: Architecture, roles: Mapping[str, TensorRole], training: Training) -> set[str]:
    """The names, among the tensors of a model, of those that a plan trains, or adapts with LoRA.

    For MoE models with LoRA or a regular expression this is what the plan says, not what transformers makes of it.
    """
    if training.train == "all":
        names = set(roles)
    elif training.train == "blocks":
        names = {name for name, role in roles.items() if role.layer is not None}
        if not training.token_local:
            names -= {name for name, role in roles.items() if architecture.token_local(role)}
    else:
        names = {name for name in roles if _matches(training.train, name, architecture)}
    if training.lora_rank:
        names = {name for name in names if len(roles[name].axes) == 2 and name != architecture.family.embedding}
    return names


def _matches(pattern: str, name: str, architecture: Architecture) -> bool:
    """Whether a plan's regular expression matches a tensor's name, which for the LM head differs in transformers."""
    return bool(re.search(pattern, "lm_head.weight" if name == architecture.family.head else name))


def check_training(model: Path, training: Training) -> None:
    """Checks that every client and every copy will train the same tensors of a model.

    The experts of an MoE layer have different numbers in each copy, so a plan that trains some of them would train other
    ones in every copy.

    Raises:
        PlanError: the plan trains only some experts of a layer, or nothing.
    """
    if training.train in ("blocks", "all"):
        return
    checkpoint = Checkpoint(model)
    architecture = Architecture.of(checkpoint)
    roles = architecture.tensor_roles(checkpoint)
    try:
        names = {name for name in roles if _matches(training.train, name, architecture)}
    except re.error as error:
        raise PlanError(f"--train {training.train}: not a regular expression: {error}") from None
    if (split := _split_experts(names, architecture)) is not None:
        raise PlanError(
            f"--train {training.train}: selects {split}, but not that tensor of every expert of the layer; the experts of "
            "the copies have other numbers, so select all experts of a layer or none"
        )
    if not names and not architecture.experts:
        raise PlanError(
            f"--train {training.train}: matches no tensor of {model}, which has names such as {sorted(roles)[-1]}"
        )


def _split_experts(names: Collection[str], architecture: Architecture) -> str | None:
    """A tensor of an expert among these whose counterpart in another expert of the layer is not among them."""
    for name in sorted(names):
        role = architecture.role_of(name)
        if role is not None and role.expert is not None:
            others = (role.template.format(layer=role.layer, expert=number) for number in range(architecture.experts))
            if any(other not in names for other in others):
                return name
    return None


def update_bytes(copy: Path, training: Training) -> int:
    """The size of an update of a copy, in bytes; for LoRA, or if the plan does not determine it, the maximum."""
    tensors = Checkpoint(copy).tensors
    names = planned_tensors(copy, training) or set(tensors)
    if rank := training.lora_rank:
        entries = sum(rank * sum(tensors[name].shape) for name in names if len(tensors[name].shape) == 2)
    else:
        entries = sum(tensors[name].nbytes // tensors[name].dtype.itemsize for name in names)
    return entries * FLOAT_DTYPES[training.update_dtype].itemsize + OVERHEAD_BYTES


def _check_factor(update: ReceivedUpdate, name: str, specs: Specs) -> None:
    """Checks the shape and dtype of a LoRA factor, and that the other factor exists."""
    path, tensors = update.tensors.place, update.tensors.tensors
    weight, which = name[: -len(FACTORS[0])], FACTORS.index(name[-len(FACTORS[0]) :])
    expected = specs[weight][1] if weight in specs else ()
    if len(expected) != 2:
        raise UpdateError(
            f"{path}: changes {name}, but the model has no matrix {weight}; expected the model's tensor names"
        )
    partner = weight + FACTORS[1 - which]
    if partner not in tensors:
        raise UpdateError(f"{path}: contains {name} without {partner}; expected both LoRA factors")
    info = tensors[name]
    rank = tensors[weight + FACTORS[0]].shape[0] if tensors[weight + FACTORS[0]].shape else 0
    shape = ((rank, expected[1]), (expected[0], rank))[which]
    if info.shape != shape or not 0 < rank <= min(expected):
        raise UpdateError(
            f"{path}: {name} has shape {list(info.shape)}, expected {list(shape)} with a rank up to {min(expected)}"
        )
    if not info.dtype.is_floating_point:
        raise UpdateError(f"{path}: {name} has dtype {info.dtype}, expected floating point")


def _square(tensors: TensorDirectory, name: str) -> float:
    """Squared norm of the update of one tensor. For LoRA factors, ‖BA‖² = trace((AAᵀ)(BᵀB))."""
    if name in tensors.tensors:
        return _tensor_square(tensors, name)
    a, b = (tensors.read(name + factor).double() for factor in FACTORS)
    return float(((a @ a.T) * (b.T @ b)).sum())


def _tensor_square(tensors: TensorDirectory, name: str) -> float:
    """Squared norm of a stored tensor, read a few rows at a time."""
    info = tensors.tensors[name]
    if not info.shape:
        return float(tensors.read(name).double().square())
    rows = max(1, (1 << 22) // max(1, info.nbytes // max(1, info.shape[0])))
    parts = (tensors.read_rows(name, at, min(at + rows, info.shape[0])) for at in range(0, info.shape[0], rows))
    return sum(float(part.float().square().sum(dtype=torch.float64)) for part in parts)
