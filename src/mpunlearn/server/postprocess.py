"""Post-Process, the server's second pass of a round: aggregates the m updates into the next checkpoint.

    Δ_k = T_k⁻¹(Δ'_k),    Δ̄ = Σ_k w_k Δ_k,    θ ← θ + η Δ̄        (arXiv 2602.23798, Algorithm 1)

Δ'_k is the client's update of copy k, T_k the reparameterization of the copy, and w ∝ 1/α_k (harmonic denoising) or the
weights of another copy design. Updates are untrusted: they are checked against the round's record and the names and
shapes of the model's tensors, their values must be finite, and the norm of an update must not exceed that of the model.
A missing update is an error. The average is never taken over the others only, since the noise would not cancel.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from mpunlearn.errors import PlanError, StateError
from mpunlearn.files import as_path
from mpunlearn.server.preprocess import Engine, shard_bytes

MAX_ETA = 10.0


def check_eta(eta: float) -> None:
    """Checks the server step size.

    Raises:
        PlanError: it is not above 0 and at most `MAX_ETA`.
    """
    if not 0 < eta <= MAX_ETA:
        raise PlanError(f"--eta: expected a number above 0 and at most {MAX_ETA:g}, found {eta:g}")


def postprocess(
    updates: Sequence[str | Path],
    *,
    state: str | Path,
    out: str | Path,
    eta: float = 1.0,
    checkpoint: str | Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    identity: str | Path | None = None,
    engine: Engine = "threads",
    max_shard_size: float = 5.0,
) -> Path:
    """Aggregates the updates of the open round into a new checkpoint.

    Args:
        updates: One directory per copy, in any order. Each is an update, a checkpoint trained from the copy with any
            tool, or a LoRA adapter trained from it with PEFT. They can be in an object store (s3://BUCKET/PREFIX, gs://… or
            az://…).
        state: Directory of the server's secret state.
        out: A new directory for the checkpoint, or one in an object store. The result is as secret as the model.
        eta: Server step size η.
        checkpoint: The new location of the round's checkpoint, if it has moved since `preprocess`.
        dtype: Storage dtype of the result (default: that of each tensor in the run's first checkpoint). Between rounds,
            float32 preserves small changes that bfloat16 would round away.
        device: Device of the computation, cpu or cuda. Their results agree up to float32 rounding.
        identity: File of the Ed25519 key that signs the run's record, as for `preprocess`.
        engine: Where the shards of the result are computed, as for `preprocess`.
        max_shard_size: Maximum size of a file of tensors, in GB. With ray, a shard is what one task writes.

    Returns:
        `out`.

    Raises:
        UpdateError: An update is missing, given twice, from another run or round, or not a valid update of this model.
        StateError: No round was published from this state, the checkpoint has changed, or the state is in use.
        FileError: The checkpoint cannot be read, or `out` exists or cannot be written.
    """
    return aggregate(
        updates,
        state=state,
        out=out,
        eta=eta,
        checkpoint=checkpoint,
        dtype=dtype,
        device=device,
        identity=identity,
        engine=engine,
        max_shard_size=max_shard_size,
    )


def aggregate(
    updates: Sequence[str | Path],
    *,
    state: str | Path,
    out: str | Path,
    eta: float,
    checkpoint: str | Path | None,
    dtype: str | None,
    device: str,
    identity: str | Path | None,
    engine: Engine = "threads",
    max_shard_size: float = 5.0,
    sent: Sequence[tuple[int, Path]] | None = None,
) -> Path:
    """`postprocess` for updates that are averages of several clients'; otherwise like that function.

    Args:
        sent: the updates that the clients sent, each with the number of its copy, for the run's record.
    """
    from mpunlearn.architecture import Architecture
    from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint
    from mpunlearn.protocol.record.artifacts import complete
    from mpunlearn.server.aggregate import Aggregation, match
    from mpunlearn.server.engine import check_engine, run_shards
    from mpunlearn.server.lineage import Lineage, model_digest, open_offset
    from mpunlearn.server.recording import Recording
    from mpunlearn.server.state import ServerState, locked
    from mpunlearn.server.stream import arithmetic_device
    from mpunlearn.storage import Place, as_place, new_place

    check_engine(engine)
    check_eta(eta)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise PlanError(f"--dtype: expected one of {', '.join(FLOAT_DTYPES)}, found {dtype}")
    arithmetic, state, place = arithmetic_device(device), as_path(state, "--state"), as_place(out, "--out")
    places = [as_place(update, "updates") for update in updates]
    with locked(state):
        server = ServerState(state)
        if not server.rounds:
            raise StateError(f"{server.path}: no round was published with this state; run `preprocess` first")
        record = server.rounds[-1]
        source = Checkpoint(as_place(checkpoint or record.checkpoint, "--checkpoint"))
        roles = Architecture.of(source).tensor_roles(source)
        if set(roles) != set(record.dtypes):
            raise StateError(f"{source.place}: not the model that round {record.round} was published from")
        received = match(places, server.run, record, hashed=engine == "threads")
        work = Aggregation(
            source,
            record,
            server.secret,
            open_offset(record.offset),
            received,
            eta,
            {name: FLOAT_DTYPES[dtype or record.dtypes[name]] for name in roles},
            shard_bytes(max_shard_size),
            arithmetic,
        )
        recording = Recording(state, server.run, as_path(identity, "--identity") if identity else None)
        used: list[tuple[int, Place]] = [*(sent or ((one.card.copy, one.tensors.place) for one in received))]
        with new_place(place, mode=0o700) as folder:
            written = run_shards(
                engine,
                len(work.shards),
                lambda number: work.write(folder, number),
                lambda number: work.task(folder, number),
                f"round {record.round}: aggregating {len(received)} updates",
            )
            digests = work.finish(folder, written)
            files = {shard.file: one.sha256 for shard, one in zip(work.shards, written, strict=True)}
            known: dict[Place, dict[str, str]] = {one.tensors.place: one.tensors.digests() for one in received}
            known[folder] = files
            recording.aggregated(folder, record.round, used, known)
            complete(folder, files)
        if record.offset is not None and record.offset.lineage is not None:
            Lineage(Path(record.offset.lineage)).adopt(model_digest(digests))
        server.close()
    return cast(Path, place)
