"""Post-Process: m updates in, one checkpoint out.

    Δ_k = T_k⁻¹(Δ'_k),    Δ̄ = Σ_k w_k Δ_k,    θ ← θ + η Δ̄        (arXiv 2602.23798, Algorithm 1)

with w ∝ 1/α_k (harmonic denoising) or the weights of another copy design. Everything that arrived is untrusted: it is
checked against the round's record and the model's own names and shapes, values must be finite and the whole update no
larger than the model. A copy that is missing is an error, never averaged over: without it the noise does not cancel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture, TensorRole
from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint, TensorWriter, copy_companions, tensor_digest
from mpunlearn.errors import CheckpointError, PlanError, StateError, UnsupportedModelError, UpdateError
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import FACTORS, ReceivedUpdate, derived_config
from mpunlearn.server.publisher import Publisher, checked_cast
from mpunlearn.server.state import RoundRecord, ServerState, locked
from mpunlearn.server.stream import (
    RowSlice,
    arithmetic_device,
    chunks,
    compute_dtype,
    in_parallel,
    on_device,
    read,
    row_slices,
)
from mpunlearn.server.updates import NORM_LIMIT, check_tensors
from mpunlearn.server.workspace import scratch


def postprocess(
    updates: Sequence[str | Path],
    *,
    state: str | Path,
    out: str | Path,
    eta: float = 1.0,
    checkpoint: str | Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
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
        device: where the arithmetic runs, cpu or cuda; both agree to float32 rounding.

    Returns:
        `out`.

    Raises:
        UpdateError: an update is missing, doubled, of another run or round, or cannot be an update of this model.
        StateError: no round was ever published from this state, its checkpoint is not what it was, or the state is in use.
        CheckpointError: the checkpoint cannot be read, or `out` exists or cannot be written.
    """
    if not math.isfinite(eta):
        raise PlanError(f"--eta: expected a number, found {eta}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise PlanError(f"--dtype: expected one of {', '.join(FLOAT_DTYPES)}, found {dtype}")
    arithmetic = arithmetic_device(device)
    with locked(Path(state)):
        server = ServerState(state)
        if not server.rounds:
            raise StateError(f"{server.path}: no round was published from this state; run `preprocess` first")
        record = server.rounds[-1]
        source = Checkpoint(checkpoint or record.checkpoint)
        architecture = Architecture.of(source)
        places = architecture.tensor_roles(source)
        if set(places) != set(record.dtypes):
            raise StateError(f"{source.path}: is another model than round {record.round} was published from")
        publisher = Publisher(server.secret, record, architecture, arithmetic)
        arrivals = _match(updates, server.run, record)
        trained = _check_tensors(arrivals, source, architecture, places, publisher)
        round_ = _Round(source, record, publisher, arrivals, trained, eta)
        specs = {name: (FLOAT_DTYPES[dtype or record.dtypes[name]], source.tensors[name].shape) for name in places}
        with new_directory(out, mode=0o700) as folder:
            copy_companions(source.path, folder)
            write_json(folder / "config.json", derived_config(source.config, specs))
            with TensorWriter(folder, specs) as writer:
                cut = _numbered(row_slices(source, places))

                def work(item: tuple[int, RowSlice]) -> tuple[float, list[float]]:
                    value, square, squares = round_.aggregate(*item)
                    name, start = item[1].name, item[1].start
                    cast = scratch("final", tuple(value.shape), specs[name][0], arithmetic)
                    writer.write_rows(name, start, checked_cast(value, specs[name][0], name, cast))
                    return square, squares

                what = f"round {record.round}: aggregating {len(arrivals)} updates"
                results = in_parallel(cut, work, what, lambda item: item[1].stop - item[1].start)
            model = sum(square for square, _ in results)
            for copy, arrival in enumerate(arrivals):
                square = sum(squares[copy] for _, squares in results)
                if square > NORM_LIMIT**2 * model:
                    raise UpdateError(
                        f"{arrival.tensors.path}: the update's norm is {math.sqrt(square / model):.3g} times the model's, "
                        f"expected at most {NORM_LIMIT:g}; train with a smaller learning rate"
                    )
        server.close()
    return Path(out)


def _numbered(cut: list[RowSlice]) -> list[tuple[int, RowSlice]]:
    """Pieces with their number within their tensor."""
    seen: dict[str, int] = {}
    numbered = []
    for piece in cut:
        numbered.append((seen.get(piece.name, 0), piece))
        seen[piece.name] = numbered[-1][0] + 1
    return numbered


@dataclass(frozen=True)
class _Round:
    """What is needed to aggregate one piece after another."""

    source: Checkpoint
    record: RoundRecord
    publisher: Publisher
    arrivals: list[ReceivedUpdate]
    trained: set[str]
    """Names of the tensors that the updates hold."""
    eta: float

    def aggregate(self, number: int, piece: RowSlice) -> tuple[torch.Tensor, float, list[float]]:
        """θ + η Δ̄ of a piece, in arithmetic dtype and scratch memory, and the squared norms of θ and of each update there.

        Raises:
            StateError: θ is not what the round was published from.
            UpdateError: an update holds NaN or infinite values.
        """
        stored = read(self.source, piece.name, piece, "stored")
        if tensor_digest(stored) != self.record.digests[piece.name][number]:
            raise StateError(
                f"{self.source.path}: {piece.name} is not what round {self.record.round} was published from; restore that "
                "checkpoint, or name where it lies now"
            )
        value = scratch("result", tuple(stored.shape), compute_dtype(stored.dtype), self.publisher.device)
        value.copy_(stored)
        square, squares = _square(value), [0.0] * len(self.arrivals)
        if piece.name in self.trained:
            for copy, arrival in enumerate(self.arrivals):
                squares[copy] = self._add(value, copy, arrival, piece, stored)
        return value, square, squares

    def _add(
        self, value: torch.Tensor, copy: int, arrival: ReceivedUpdate, piece: RowSlice, stored: torch.Tensor
    ) -> float:
        """Adds η w_k T_k⁻¹(Δ'_k) to `value`; returns the squared norm of Δ'_k."""
        name = self.publisher.maps[copy].published_name(piece.name, piece.place)
        if name + FACTORS[0] in arrival.tensors.tensors:
            return self._add_product(value, copy, arrival, piece, name)
        update = on_device(read(arrival.tensors, name, piece, "update"), value.device, "update")
        if arrival.trained is not None:
            published = self.publisher.publish(piece, stored, [copy])[0][0]
            update = update.to(value.dtype) - published.to(value.dtype)
        weight = self.eta * float(self.publisher.design.weights[copy])
        maps = self.publisher.maps[copy].maps(piece.place)
        rows, row = len(value), value.numel() // max(1, len(value))
        square = 0.0
        for start, stop in chunks(rows, row, maps[0].block, value.device):
            delta = scratch("delta", tuple(value[start:stop].shape), value.dtype, value.device)
            delta.copy_(maps[0].gather(update, start, stop))
            square += _square(delta)
            for axis, axis_map in list(enumerate(maps))[1:]:
                delta = axis_map.rearrange(delta, axis)
            for axis, axis_map in enumerate(maps):
                delta = axis_map.rotate(delta, axis, start if axis == 0 else 0, transpose=True)
            value[start:stop].add_(delta, alpha=weight)
        return _checked(square, arrival, name, copy)

    def _add_product(
        self, value: torch.Tensor, copy: int, arrival: ReceivedUpdate, piece: RowSlice, name: str
    ) -> float:
        """`_add` for an update that came as factors: T⁻¹(B A) = (L_out⁻¹ B)(A L_in), multiplied out a chunk at a time."""
        a, b = (arrival.tensors.read(name + factor).to(value.device, value.dtype) for factor in FACTORS)
        outputs, inputs = self.publisher.maps[copy].maps(piece.place)
        a, b = inputs.invert(a, 1), outputs.invert(b, 0)[piece.start : piece.stop]
        weight = self.eta * float(self.publisher.design.weights[copy])
        square = 0.0
        for start, stop in chunks(value.shape[0], value.shape[1], 1, value.device):
            delta = scratch("delta", tuple(value[start:stop].shape), value.dtype, value.device)
            torch.mm(b[start:stop], a, out=delta)
            square += _square(delta)
            value[start:stop].add_(delta, alpha=weight)
        return _checked(square, arrival, name, copy)


def _checked(square: float, arrival: ReceivedUpdate, name: str, copy: int) -> float:
    """The squared norm, once it is known to be a number."""
    if not math.isfinite(square):
        raise UpdateError(f"{arrival.tensors.path}: {name} holds NaN or infinite values; train copy {copy + 1} again")
    return square


def _square(value: torch.Tensor) -> float:
    flat = value.flatten()
    return sum(float(torch.dot(flat[a:b], flat[a:b])) for a, b in chunks(flat.numel(), 1, 1, value.device))


def _match(updates: Sequence[str | Path], run: str, record: RoundRecord) -> list[ReceivedUpdate]:
    """The arrivals in the order of their copies, exactly one for each copy of the round."""
    copies = record.settings["copies"]
    found: dict[int, ReceivedUpdate] = {}
    for path in updates:
        arrival = ReceivedUpdate.open(path)
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
    arrivals: list[ReceivedUpdate],
    source: Checkpoint,
    architecture: Architecture,
    places: dict[str, TensorRole],
    publisher: Publisher,
) -> set[str]:
    """Names, shapes and dtypes of all arrivals; returns θ's names of what they update, which must be the same in all."""
    names: list[set[str]] = []
    for copy, arrival in enumerate(arrivals):
        originals = {publisher.maps[copy].published_name(name, place): name for name, place in places.items()}
        specs = {shown: (publisher.dtype(name), source.tensors[name].shape) for shown, name in originals.items()}
        mine = None
        if arrival.trained is not None:
            try:
                mine = set(architecture.tensor_roles(arrival.trained))
            except (UnsupportedModelError, CheckpointError) as error:
                raise UpdateError(f"not a model trained from a published copy: {error}") from error
        names.append({originals[name] for name in check_tensors(arrival, specs, mine)})
    for arrival, found in zip(arrivals[1:], names[1:], strict=True):
        if difference := sorted(found ^ names[0]):
            raise UpdateError(
                f"{arrival.tensors.path} and {arrivals[0].tensors.path} update different tensors, the first is "
                f"{difference[0]}; every copy must be trained alike, or the noise does not cancel"
            )
    return names[0]
