"""Post-Process: m updates in, one checkpoint out.

    Δ_k = T_k⁻¹(Δ'_k),    Δ̄ = Σ_k w_k Δ_k,    θ ← θ + η Δ̄        (arXiv 2602.23798, Algorithm 1)

with w ∝ 1/α_k (harmonic denoising) or the weights of another copy design. Everything that arrived is untrusted: it is
checked against the round's record and the model's own names and shapes, values must be finite and the whole update no
larger than the model. A copy that is missing is an error, never averaged over: without it the noise does not cancel.
"""

import math
from pathlib import Path

import torch

from mpunlearn.architecture import FAMILIES, Architecture, Place
from mpunlearn.architecture.spaces import architecture_of, compute_dtype
from mpunlearn.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    TensorWriter,
    copy_companions,
    new_directory,
    tensor_digest,
    write_json,
)
from mpunlearn.errors import CheckpointError, PlanError, StateError, UnsupportedModelError, UpdateError
from mpunlearn.progress import progress
from mpunlearn.protocol.exchange import Arrival
from mpunlearn.server.preprocess import Publisher, derived_config
from mpunlearn.server.state import RoundRecord, ServerState

NORM_LIMIT = 1.0
"""An update whose norm exceeds this share of the model's norm is refused: it would replace the model."""


def postprocess(
    updates: list[str | Path] | list[Path] | list[str],
    *,
    state: str | Path,
    out: str | Path,
    eta: float = 1.0,
    checkpoint: str | Path | None = None,
    dtype: str | None = None,
) -> Path:
    """Aggregates the updates of the open round into a new checkpoint.

    Args:
        updates: one directory per copy, in any order: an update, or a checkpoint that any tool trained from the copy.
        state: the server's secret state.
        out: a new directory for the checkpoint.
        eta: server step size η.
        checkpoint: where the round's checkpoint lies now, if it has moved since `preprocess`.
        dtype: storage dtype of the result (default: each tensor's own, as in the run's first checkpoint). Between rounds
            float32 keeps what bfloat16 would round away.

    Returns:
        `out`.

    Raises:
        UpdateError: an update is missing, doubled, of another run or round, or cannot be an update of this model.
        StateError: no round was ever published from this state, or its checkpoint is not what it was.
        CheckpointError: the checkpoint cannot be read, or `out` exists or cannot be written.
    """
    if not math.isfinite(eta):
        raise PlanError(f"--eta: expected a number, found {eta}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise PlanError(f"--dtype: expected one of {', '.join(FLOAT_DTYPES)}, found {dtype}")
    server = ServerState(state)
    if not server.rounds:
        raise StateError(f"{server.path}: no round was published from this state; run `preprocess` first")
    record = server.rounds[-1]
    source = Checkpoint(checkpoint or record.checkpoint)
    architecture = architecture_of(source, FAMILIES)
    places = architecture.places(source)
    arrivals = _match(updates, server.run, record)
    publisher = Publisher(server.secret, record, architecture)
    trained = _check_tensors(arrivals, source, architecture, places, publisher)
    specs = {name: (FLOAT_DTYPES[dtype or record.dtypes[name]], source.tensors[name].shape) for name in places}
    squares, model_square = [0.0] * len(arrivals), 0.0
    with new_directory(out) as folder:
        copy_companions(source.path, folder)
        write_json(folder / "config.json", derived_config(source.config, specs))
        with TensorWriter(folder, specs) as writer:
            for name, place in progress(places.items(), f"round {record.round}: aggregating {len(arrivals)} updates"):
                stored = source.read(name)
                if tensor_digest(stored) != record.digests.get(name):
                    raise StateError(
                        f"{source.path}: {name} is not what round {record.round} was published from; restore that "
                        "checkpoint, or name where it lies now"
                    )
                value = stored.to(compute_dtype(stored.dtype))
                model_square += float(value.square().sum(dtype=torch.float64))
                if name in trained:
                    total = torch.zeros_like(value)
                    for copy, arrival in enumerate(arrivals):
                        update = _update(arrival, copy, name, place, stored, publisher)
                        squares[copy] += float(update.square().sum(dtype=torch.float64))
                        inverted = publisher.maps[copy].invert(place, update)
                        total.add_(inverted, alpha=float(publisher.design.weights[copy]))
                    value = value + eta * total
                writer.write(name, value.to(specs[name][0]))
        for arrival, square in zip(arrivals, squares, strict=True):
            if square > NORM_LIMIT**2 * model_square:
                raise UpdateError(
                    f"{arrival.tensors.path}: the update's norm is {math.sqrt(square / model_square):.3g} times the "
                    f"model's, expected at most {NORM_LIMIT:g}; train with a smaller learning rate"
                )
    server.close()
    return Path(out)


def _match(updates: list[str | Path] | list[Path] | list[str], run: str, record: RoundRecord) -> list[Arrival]:
    """The arrivals in the order of their copies, exactly one for each copy of the round."""
    copies = record.settings["copies"]
    found: dict[int, Arrival] = {}
    for path in updates:
        arrival = Arrival.open(path)
        card = arrival.card
        if card.run != run or card.round != record.round or card.copies != copies or card.copy > copies:
            raise UpdateError(f"{path}: is of {card}; expected a copy of {copies}, round {record.round}, run {run[:8]}")
        if card.copy in found:
            raise UpdateError(
                f"{path}: is of copy {card.copy}, and so is {found[card.copy].tensors.path}; give each once"
            )
        found[card.copy] = arrival
    if missing := [copy for copy in range(1, copies + 1) if copy not in found]:
        raise UpdateError(
            f"no update of {'copy' if len(missing) == 1 else 'copies'} {', '.join(map(str, missing))} of round "
            f"{record.round}; the noise cancels only over all {copies} copies"
        )
    return [found[copy] for copy in sorted(found)]


def _check_tensors(
    arrivals: list[Arrival],
    source: Checkpoint,
    architecture: Architecture,
    places: dict[str, Place],
    publisher: Publisher,
) -> set[str]:
    """Names, shapes and dtypes of all arrivals; returns the names that they update, which must be the same in all."""
    names: list[set[str]] = []
    for arrival in arrivals:
        path, tensors = arrival.tensors.path, arrival.tensors.tensors
        if arrival.trained is not None:
            try:
                mine = set(architecture.places(arrival.trained))
            except (UnsupportedModelError, CheckpointError) as error:
                raise UpdateError(f"not a model trained from a published copy: {error}") from error
        else:
            mine = set(tensors)
        for name in sorted(mine):
            if name not in places:
                raise UpdateError(f"{path}: updates {name}, which the model does not have; expected its tensors' names")
            expected, info = source.tensors[name], tensors[name]
            if info.shape != expected.shape:
                raise UpdateError(f"{path}: {name} has shape {list(info.shape)}, expected {list(expected.shape)}")
            if not info.dtype.is_floating_point:
                raise UpdateError(f"{path}: {name} has dtype {info.dtype}, expected floating point")
            published = publisher.dtype(name)
            if arrival.trained is not None and torch.finfo(info.dtype).eps > torch.finfo(published).eps:
                raise UpdateError(
                    f"{path}: {name} is stored as {info.dtype}, but the copy was published as {published}; rounding "
                    f"would drown the update, save the trained model as {published}"
                )
        names.append(mine)
    for arrival, mine in zip(arrivals[1:], names[1:], strict=True):
        if difference := sorted(mine ^ names[0]):
            raise UpdateError(
                f"{arrival.tensors.path} and {arrivals[0].tensors.path} update different tensors, the first is "
                f"{difference[0]}; every copy must be trained alike, or the noise does not cancel"
            )
    return names[0]


def _update(
    arrival: Arrival, copy: int, name: str, place: Place, stored: torch.Tensor, publisher: Publisher
) -> torch.Tensor:
    """Δ'_k of one tensor, in published coordinates and in the arithmetic dtype."""
    arrived = arrival.tensors.read(name)
    update = arrived.to(compute_dtype(stored.dtype))
    if not bool(torch.isfinite(update).all()):
        raise UpdateError(f"{arrival.tensors.path}: {name} holds NaN or infinite values; train copy {copy + 1} again")
    if arrival.trained is not None:
        update = update - publisher.tensors(name, place, stored, [copy])[0].to(update.dtype)
    return update
