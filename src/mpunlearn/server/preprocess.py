"""Pre-Process, the server's first pass of a round: turns its model θ into m published copies.

    θ_k = T_k(θ + c + ε_k),    ε_k = σ Σ_d A_kd z_d        (arXiv 2602.23798, Algorithm 1, which has no c)

T_k is the secret reparameterization of copy k (see `reparameterization`), ε_k its noise (see `noise`), A the
coefficients of the copy design (see `design`), and c the offset that all copies share (see `offset`). A first pass over
θ measures σ and computes digests; a second pass streams θ through the noise and the reparameterizations (see
`publisher`). All copies become visible atomically. The second pass also measures how much of the noise survives the
cast to the storage dtype: the share of published entries that equal those of θ, and the residual entropy per entry on
the grid of θ.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import FileError, StateError
from mpunlearn.files import as_path, new_directory
from mpunlearn.server.perturbation import Perturbation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpunlearn.architecture import TensorRole
    from mpunlearn.checkpoint import Checkpoint
    from mpunlearn.server.noise import Measurement
    from mpunlearn.server.offset import OffsetRecord
    from mpunlearn.server.state import RoundingLeakage, ServerState


@dataclass(frozen=True)
class Published:
    """A published round."""

    round: int
    copies: list[Path]
    """Directories of the copies, in order."""
    rounding: "dict[str, RoundingLeakage]"
    """For each tensor, how much of the noise survived rounding; empty without noise."""
    offset: "OffsetRecord | None" = None
    """The secret offset that all copies share."""

    def summary(self) -> str:
        """A summary in a few lines."""
        lines = [f"round {self.round}: {len(self.copies)} copies"]
        if self.offset:
            lines.append(
                f"averaging all copies of all rounds leaves a client with a parameter error of {self.offset.floor:.1%}"
            )
        if self.rounding:
            values = list(self.rounding.values())
            entropies = sorted(value.entropy for value in values)
            lines.append(
                f"residual entropy of the noise after rounding: {entropies[0]:.2f} to {entropies[-1]:.2f} bits per "
                f"entry (median {entropies[len(entropies) // 2]:.2f}); entries that rounding returned to their "
                f"original value: at most {max(value.equal for value in values):.1%} of a tensor"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        floor = self.offset.floor if self.offset else 0.0
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "offset"}
        return {**values, "copies": [str(copy) for copy in self.copies], "floor": floor}


def preprocess(
    checkpoint: str | Path,
    *,
    state: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    stand_in: str | Path | None = None,
    lineage: str | Path | None = None,
    device: str = "cpu",
    identity: str | Path | None = None,
    perturbation: Perturbation | None = None,
) -> Published:
    """Publishes the copies of the next round.

    Args:
        checkpoint: The server's model θ, a Hugging Face checkpoint directory.
        state: Directory of the server's secret state. It is created in the first round and shared by all rounds of a
            run.
        out: A new directory for the copies, OUT/copy-1 … OUT/copy-m. It contains no secrets.
        base: The public checkpoint that the model was fine-tuned from. If given, the noise level is relative to the
            task vector (the model's weights minus the base's).
        stand_in: A checkpoint of the same shapes to make the copies of, instead of the model. The updates are applied
            to the model.
        lineage: Directory of the secret key of the common noise, shared by all runs of the model and of its successors
            (default: in the user's data folder, found by the model's digest).
        device: Device of the computation, cpu or cuda. Their results agree up to float32 rounding.
        identity: File of the Ed25519 key that signs the run's record (default: STATE/identity.key). It is created if it
            does not exist.
        perturbation: Number of copies, noise level, reparameterization.

    Returns:
        The copies, and how much of their noise survived rounding.

    Raises:
        FileError: The checkpoint or the base is damaged, or `out` exists or cannot be written.
        UnsupportedModelError: The model's family or number format cannot be handled exactly.
        StateError: The state or the lineage is damaged or in use, or the round has other inputs than the run.
    """
    return publish(
        checkpoint,
        state=state,
        out=out,
        base=base,
        stand_in=stand_in,
        lineage=lineage,
        device=device,
        identity=identity,
        perturbation=perturbation,
    )


def publish(
    checkpoint: str | Path,
    *,
    state: str | Path,
    out: str | Path,
    base: str | Path | None,
    stand_in: str | Path | None,
    lineage: str | Path | None,
    device: str,
    identity: str | Path | None,
    perturbation: Perturbation | None,
    plan: Path | None = None,
) -> Published:
    """`preprocess` for a run with a plan file, which the run's record names; otherwise like that function."""
    from mpunlearn.architecture import Architecture
    from mpunlearn.checkpoint import Checkpoint, dtype_name
    from mpunlearn.server.copies import write_copies
    from mpunlearn.server.lineage import open_offset
    from mpunlearn.server.noise import measure
    from mpunlearn.server.recording import Recording
    from mpunlearn.server.state import RoundRecord, ServerState, inputs_digest, locked
    from mpunlearn.server.stream import arithmetic_device

    perturbation, arithmetic = perturbation or Perturbation(), arithmetic_device(device)
    source, out = Checkpoint(as_path(checkpoint, "checkpoint")), as_path(out, "--out")
    state = as_path(state, "--state")
    architecture = Architecture.of(source)
    roles = architecture.tensor_roles(source)
    if out.exists():
        raise FileError(f"{out}: already exists; choose another directory for the copies, or remove this one")
    with locked(state):
        server = ServerState(state)
        if server.rounds and set(server.rounds[0].dtypes) != set(roles):
            raise StateError(f"{server.path}: belongs to a different model than {source.path}; use a new --state")
        measured = measure(source, Checkpoint(as_path(base, "--base")) if base is not None else None, roles)
        number = server.next_round
        dtypes = {name: dtype_name(source.tensors[name].dtype) for name in roles}
        dtypes = server.rounds[0].dtypes if server.rounds else dtypes
        offset = _offset(server, source, roles, measured, perturbation, stand_in, lineage)
        inputs = inputs_digest(number, measured.digests, measured.base, dtypes, perturbation.to_json(), offset)
        uniforms = server.secret.stream("alpha", inputs).uniforms(2 * perturbation.copies)
        record = RoundRecord(
            round=number,
            checkpoint=str(source.path.resolve()),
            digests=measured.digests,
            base=measured.base,
            dtypes=dtypes,
            perturbation=perturbation,
            inputs=inputs,
            alphas=perturbation.scales([float(uniform) for uniform in uniforms]),
            sigma={block: perturbation.kappa * rms for block, rms in measured.rms.items()},
            offset=offset,
        )
        with server.opened(record, out) as pinned, new_directory(out) as folder:
            rounding = write_copies(source, architecture, server, pinned, folder, arithmetic, open_offset(offset))
            recording = Recording(state, server.run, as_path(identity, "--identity") if identity else None, plan)
            copies = [folder / f"copy-{copy}" for copy in range(1, perturbation.copies + 1)]
            models = {"model": source.path, "base": base, "stand_in": stand_in}
            recording.published(
                copies, number, {name: Path(path) for name, path in models.items() if path is not None}, perturbation
            )
        server.measured(rounding)
    return Published(number, [out / f"copy-{copy}" for copy in range(1, perturbation.copies + 1)], rounding, offset)


def _offset(
    server: "ServerState",
    source: "Checkpoint",
    roles: "Mapping[str, TensorRole]",
    measured: "Measurement",
    perturbation: Perturbation,
    stand_in: str | Path | None,
    lineage: str | Path | None,
) -> "OffsetRecord | None":
    """The offset of the next round: that of the first round, or a new one in the first.

    Raises:
        StateError: it differs from that of the first round.
    """
    from mpunlearn.checkpoint import Checkpoint
    from mpunlearn.server.lineage import Lineage
    from mpunlearn.server.offset import OffsetRecord, open_stand_in

    first = server.rounds[0] if server.rounds else None
    pinned = first.offset if first else None
    part = None
    if stand_in is not None:
        origin = Checkpoint(pinned.stand_in.origin) if pinned and pinned.stand_in else source
        part = open_stand_in(as_path(stand_in, "--stand-in"), origin, roles)
    if first is not None:
        before = pinned.stand_in if pinned else None
        if (part and part.digest) != (before and before.digest):
            raise StateError(
                f"{server.path}: round 1 had {f'the stand-in {before.path}' if before else 'no stand-in'}; use the same "
                "in every round, since two offsets in one run would show both"
            )
        asked, had = perturbation, first.perturbation
        if (asked.common_noise, asked.common_noise_shape) != (had.common_noise, had.common_noise_shape):
            raise StateError(
                f"{server.path}: round 1 had --common-noise {had.common_noise}; use the same in every round"
            )
        return pinned
    if perturbation.common_noise == 0:
        return OffsetRecord(stand_in=part) if part else None
    place = as_path(lineage, "--lineage") if lineage is not None else None
    kept = Lineage.of(measured, roles, place)
    common = kept.common_noise(perturbation.common_noise, perturbation.common_noise_shape, measured, roles)
    return OffsetRecord(str(kept.path.resolve()), common, part)
