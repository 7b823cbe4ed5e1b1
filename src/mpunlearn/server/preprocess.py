"""Pre-Process, the server's first pass of a round: turns its model θ into m published copies.

    θ_k = T_k(θ + c + ε_k),    ε_k = σ Σ_d A_kd z_d        (arXiv 2602.23798, Algorithm 1, which has no c)

T_k is the secret reparameterization of copy k (see `reparameterization`), ε_k its noise (see `noise`), A the
coefficients of the copy design (see `design`), and c the offset that all copies share (see `offset`). A first pass over
θ measures σ and computes digests (see `publication`). A second pass streams θ through the noise and the
reparameterizations (see `publisher`), one shard of the copies at a time (see `copies`): in this process, on a Ray cluster
(see `engine`), or in several invocations (see `parts`). All copies become visible atomically. The second pass also measures
how much of the noise survives the cast to the storage dtype: the share of published entries that equal those of θ, and the
residual entropy per entry on the grid of θ.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mpunlearn.errors import FileError, PlanError
from mpunlearn.files import as_path
from mpunlearn.server.perturbation import Perturbation

if TYPE_CHECKING:
    from mpunlearn.server.offset import OffsetRecord
    from mpunlearn.server.publication import Publication
    from mpunlearn.server.state import RoundingLeakage
    from mpunlearn.storage import Place

Engine = Literal["threads", "ray"]
"""Where the shards of a pass are computed."""


@dataclass(frozen=True)
class Published:
    """A published round."""

    round: int
    copies: list[Path]
    """Directories of the copies, in order; none if only some shards were written. Those in a store are `StorePath`s."""
    rounding: "dict[str, RoundingLeakage]"
    """For each tensor, how much of the noise survived rounding; empty without noise."""
    offset: "OffsetRecord | None" = None
    """The secret offset that all copies share."""
    shards: list[int] = dataclasses.field(default_factory=list)
    """With `shard`, the numbers of the shards that are complete now, starting at 1."""
    of_shards: int = 0
    """With `shard`, the number of all shards."""

    def summary(self) -> str:
        """A summary in a few lines."""
        if self.of_shards:
            numbers = ", ".join(map(str, self.shards)) or "none"
            return f"round {self.round}: shards {numbers} of {self.of_shards} are complete; then --finish"
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
    engine: Engine = "threads",
    shard: str | None = None,
    finish: bool = False,
    max_shard_size: float = 5.0,
    perturbation: Perturbation | None = None,
) -> Published:
    """Publishes the copies of the next round.

    Args:
        checkpoint: The server's model θ, a Hugging Face checkpoint directory, or one in an object store
            (s3://BUCKET/PREFIX, gs://… or az://…).
        state: Directory of the server's secret state. It is created in the first round and shared by all rounds of a
            run.
        out: A new directory for the copies, OUT/copy-1 … OUT/copy-m, or one in an object store. It contains no secrets.
        base: The public checkpoint that the model was fine-tuned from. If given, the noise level is relative to the
            task vector (the model's weights minus the base's). It can be in an object store.
        stand_in: A checkpoint of the same shapes to make the copies of, instead of the model. The updates are applied
            to the model.
        lineage: Directory of the secret key of the common noise, shared by all runs of the model and of its successors
            (default: in the user's data folder, found by the model's digest).
        device: Device of the computation, cpu or cuda. Their results agree up to float32 rounding.
        identity: File of the Ed25519 key that signs the run's record (default: STATE/identity.key). It is created if it
            does not exist.
        engine: Where the shards are computed: threads of this process, or ray, a Ray cluster (that of RAY_ADDRESS, or
            else one on this machine). All machines must reach the model and the copies by the same names.
        shard: I/N: write only the I-th of N shares of the shards, on one of N machines; then --finish.
        finish: Make the copies appear that were written with --shard.
        max_shard_size: Maximum size of a file of tensors, in GB. With ray or --shard, a shard is what one task writes.
        perturbation: Number of copies, noise level, reparameterization.

    Returns:
        The copies, and how much of their noise survived rounding; with `shard`, what was written.

    Raises:
        FileError: The checkpoint or the base is damaged, `out` exists or cannot be written, or a shard is missing.
        UnsupportedModelError: The model's family or number format cannot be handled exactly.
        StateError: The state or the lineage is damaged or in use, or the round has other inputs than the run.
        PlanError: An option is invalid, or two options contradict each other.
    """
    if shard is None and not finish:
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
            engine=engine,
            max_shard_size=max_shard_size,
        )
    from mpunlearn.server.parts import finish_parts, write_part

    if engine != "threads" or (shard is not None and finish):
        raise PlanError("--shard, --finish and --engine ray: expected only one of them")
    publication = _publication(
        checkpoint, state, out, base, stand_in, lineage, device, identity, perturbation, max_shard_size, None
    )
    if shard is not None:
        record, numbers, total = write_part(publication, shard)
        return Published(record.round, [], {}, record.offset, numbers, total)
    record, rounding = finish_parts(publication)
    return Published(record.round, _copies(publication.out, record.perturbation), rounding, record.offset)


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
    engine: Engine = "threads",
    max_shard_size: float = 5.0,
    plan: Path | None = None,
) -> Published:
    """`preprocess` in one go, for a run with a plan file, which the run's record names; otherwise like that function."""
    from mpunlearn.server.engine import check_engine, run_shards
    from mpunlearn.server.state import ServerState, locked
    from mpunlearn.storage import new_place

    check_engine(engine)
    publication = _publication(
        checkpoint, state, out, base, stand_in, lineage, device, identity, perturbation, max_shard_size, plan
    )
    place = publication.out
    if isinstance(place, Path) and place.exists():
        raise FileError(f"{place}: already exists; choose another directory for the copies, or remove this one")
    with locked(publication.state):
        server = ServerState(publication.state)
        record, models = publication.open(server)
        with server.opened(record, place) as pinned, new_place(place) as folder:
            copies = publication.copies(server, pinned, folder)
            written = run_shards(
                engine,
                len(copies.shards),
                lambda number: copies.write(number, check=False),
                copies.task,
                f"round {record.round}: publishing {len(copies.folders)} copies",
            )
            rounding = publication.finish(server, copies, written, models)
        server.measured(rounding)
    return Published(pinned.round, _copies(place, pinned.perturbation), rounding, pinned.offset)


def _publication(
    checkpoint: Any,
    state: Any,
    out: Any,
    base: Any,
    stand_in: Any,
    lineage: Any,
    device: str,
    identity: Any,
    perturbation: Perturbation | None,
    max_shard_size: float,
    plan: Path | None,
) -> "Publication":
    """Checks the options of `preprocess`."""
    from mpunlearn.server.publication import Publication
    from mpunlearn.server.stream import arithmetic_device
    from mpunlearn.storage import as_place

    arithmetic = arithmetic_device(device)
    return Publication(
        as_place(checkpoint, "checkpoint"),
        as_path(state, "--state"),
        as_place(out, "--out"),
        as_place(base, "--base") if base is not None else None,
        as_path(stand_in, "--stand-in") if stand_in is not None else None,
        as_path(lineage, "--lineage") if lineage is not None else None,
        arithmetic,
        as_path(identity, "--identity") if identity is not None else None,
        perturbation or Perturbation(),
        shard_bytes(max_shard_size),
        plan,
    )


def shard_bytes(max_shard_size: float) -> int:
    """The size in bytes of --max-shard-size.

    Raises:
        PlanError: it is not above 0.
    """
    if not 0 < max_shard_size < math.inf:
        raise PlanError(f"--max-shard-size: expected a number of GB above 0, found {max_shard_size:g}")
    return max(1, round(max_shard_size * 1e9))


def _copies(out: "Place", perturbation: Perturbation) -> list[Path]:
    return [cast(Path, out / f"copy-{copy}") for copy in range(1, perturbation.copies + 1)]
