"""What a client sent back, examined before anything of it is used, and what several clients sent, averaged.

An update is checked against the published copy that it belongs to: it may update only tensors that the copy has, in their
shapes, with finite numbers, and with a norm that is not out of all proportion. Changes of basis keep norms, so this needs no
secret.

Clients that each unlearn their own text on the same copy are averaged in that copy's basis, before the server's inverse: both
are linear. Factors are averaged without multiplying them out: Σ v_c B_c A_c = [v_1 B_1 | v_2 B_2 | …] [A_1; A_2; …].
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.errors import UpdateError
from mpunlearn.protocol.exchange import FACTORS, Card, ReceivedUpdate

NORM_LIMIT = 1.0
"""An update whose norm exceeds this share of the model's norm is refused: it would replace the model."""
MARGIN = 0.999
"""What is let in must not be refused later for the rounding of its norm."""
FACTOR_LIMIT = 1e15
"""Greatest norm of a factor: two of them stay in float32's range, in any basis."""
CANCELLATION = 1e3
"""How many times larger than their product factors may be: beyond it, float32 in another basis is no longer their product."""
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Published name of each tensor → published dtype and shape."""


def examine(
    path: Path, copy: Path, model: Path, card: Card, *, factored: bool, expected: Collection[str] | None = None
) -> Path:
    """Checks an update that arrived against the copy that it should be of, in full.

    Args:
        path: the update's directory.
        copy: the published copy's.
        model: θ's, whose norm is what the update's is compared with: changes of basis keep it, noise does not.
        card: which copy that is.
        factored: whether the plan has it sent as factors.
        expected: published names of the tensors that it must update (default: any).

    Returns:
        `path`.

    Raises:
        UpdateError: it is not an update of that copy, holds NaN or infinite values, or its norm is impossible.
    """
    arrival, published = ReceivedUpdate.open(path), Checkpoint(copy)
    if arrival.card != card:
        raise UpdateError(f"{path}: is of {arrival.card}; expected {card}")
    if arrival.trained is not None:
        raise UpdateError(f"{path}: is a checkpoint; expected an update")
    names = check_tensors(arrival, {name: (info.dtype, info.shape) for name, info in published.tensors.items()})
    if expected is not None and (difference := sorted(names ^ set(expected))):
        raise UpdateError(
            f"{path}: updates {len(names)} tensors, expected the {len(expected)} that the plan trains; the first that "
            f"{'should not be' if difference[0] in names else 'is not'} there is {difference[0]}"
        )
    if wrong := sorted(name for name in arrival.tensors.tensors if name.endswith(FACTORS) != factored):
        raise UpdateError(f"{path}: {wrong[0]} is {'no' if factored else 'a'} factor; the plan says otherwise")
    square = sum(_square(arrival.tensors, name) for name in sorted(names))
    if not math.isfinite(square):
        raise UpdateError(f"{path}: holds NaN or infinite values; train again")
    limit = MARGIN * NORM_LIMIT
    theta = Checkpoint(model)
    of_model = sum(_norm(theta, name) for name in theta.tensors)
    for name in sorted(names) if factored else ():
        a, b = (_norm(arrival.tensors, name + factor) for factor in FACTORS)
        if max(a, b) > FACTOR_LIMIT**2:
            raise UpdateError(
                f"{path}: a factor of {name} is beyond {FACTOR_LIMIT:g}; it would overflow in another basis"
            )
        if a * b > CANCELLATION**2 * of_model:
            raise UpdateError(f"{path}: the factors of {name} cancel; in another basis their product would be another")
    if square > limit**2 * of_model:
        raise UpdateError(
            f"{path}: the update's norm is {math.sqrt(square / of_model):.3g} times the model's, expected at most {limit:g}"
        )
    return path


def _square(tensors: TensorDirectory, name: str) -> float:
    """Squared norm of the update of one tensor; of factors, ‖BA‖² = trace((AAᵀ)(BᵀB))."""
    if name in tensors.tensors:
        return _norm(tensors, name)
    a, b = (tensors.read(name + factor).double() for factor in FACTORS)
    return float(((a @ a.T) * (b.T @ b)).sum())


def _norm(tensors: TensorDirectory, name: str) -> float:
    """Squared norm of a stored tensor, a few rows at a time."""
    info = tensors.tensors[name]
    if not info.shape:
        return float(tensors.read(name).double().square())
    rows = max(1, (1 << 22) // max(1, info.nbytes // max(1, info.shape[0])))
    parts = (tensors.read_rows(name, at, min(at + rows, info.shape[0])) for at in range(0, info.shape[0], rows))
    return sum(float(part.float().square().sum(dtype=torch.float64)) for part in parts)


def updated(path: Path) -> set[str]:
    """The names of the tensors that an update is of."""
    return {
        name[: -len(FACTORS[0])] if name.endswith(FACTORS) else name
        for name in ReceivedUpdate.open(path).tensors.tensors
    }


def check_tensors(arrival: ReceivedUpdate, specs: Specs, names: Collection[str] | None = None) -> set[str]:
    """Names, shapes and dtypes of one arrival against the published copy's tensors.

    Args:
        specs: the copy's tensors.
        names: which of the arrival's tensors count (default: all).

    Returns:
        The published names of what it updates.

    Raises:
        UpdateError: something in it is not the update of a tensor that the copy has.
    """
    path, tensors = arrival.tensors.path, arrival.tensors.tensors
    mine = set(tensors if names is None else names)
    for factor in sorted(name for name in mine if name.endswith(FACTORS)):
        _check_factor(arrival, factor, specs)
    weights = {name for name in mine if not name.endswith(FACTORS)}
    factored = {name.removesuffix(FACTORS[0]) for name in mine if name.endswith(FACTORS[0])}
    if twice := sorted(weights & factored):
        raise UpdateError(f"{path}: holds {twice[0]} itself and its factors; expected one of them")
    for name in sorted(weights):
        if name not in specs:
            raise UpdateError(f"{path}: updates {name}, which the model does not have; expected its tensors' names")
        published, shape = specs[name]
        info = tensors[name]
        if info.shape != shape:
            raise UpdateError(f"{path}: {name} has shape {list(info.shape)}, expected {list(shape)}")
        if not info.dtype.is_floating_point:
            raise UpdateError(f"{path}: {name} has dtype {info.dtype}, expected floating point")
        if arrival.trained is not None and torch.finfo(info.dtype).eps > torch.finfo(published).eps:
            raise UpdateError(
                f"{path}: {name} is stored as {info.dtype}, but the copy was published as {published}; rounding "
                f"would drown the update, save the trained model as {published}"
            )
    return weights | factored


def _check_factor(arrival: ReceivedUpdate, name: str, specs: Specs) -> None:
    """One factor of a weight's update: its partner, its shape and its dtype."""
    path, tensors = arrival.tensors.path, arrival.tensors.tensors
    weight, which = name[: -len(FACTORS[0])], FACTORS.index(name[-len(FACTORS[0]) :])
    expected = specs[weight][1] if weight in specs else ()
    if len(expected) != 2:
        raise UpdateError(f"{path}: updates {name}, but the model has no matrix {weight}; expected its tensors' names")
    partner = weight + FACTORS[1 - which]
    if partner not in tensors:
        raise UpdateError(f"{path}: holds {name} without {partner}; expected both factors")
    info = tensors[name]
    rank = tensors[weight + FACTORS[0]].shape[0] if tensors[weight + FACTORS[0]].shape else 0
    shape = ((rank, expected[1]), (expected[0], rank))[which]
    if info.shape != shape or not 0 < rank <= min(expected):
        raise UpdateError(
            f"{path}: {name} has shape {list(info.shape)}, expected {list(shape)} of a rank up to {min(expected)}"
        )
    if not info.dtype.is_floating_point:
        raise UpdateError(f"{path}: {name} has dtype {info.dtype}, expected floating point")
