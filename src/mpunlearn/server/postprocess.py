"""Post-Process: m updates in, one checkpoint out.

    Δ_k = T_k⁻¹(Δ'_k),    Δ̄ = Σ_k w_k Δ_k,    θ ← θ + η Δ̄        (arXiv 2602.23798, Algorithm 1)

with w ∝ 1/α_k (harmonic denoising) or the weights of another copy design. Everything that arrived is untrusted: it is checked
against the round's record and the model's own names and shapes, values must be finite, and the whole update must not be larger
than the model. A missing copy is an error; it is never averaged over, since the noise would not cancel without it.
"""

from collections.abc import Sequence
from pathlib import Path

from mpunlearn.errors import PlanError, StateError
from mpunlearn.files import as_path

MAX_ETA = 10.0


def check_eta(eta: float) -> None:
    """Refuses an impossible server step size.

    Raises:
        PlanError: it is not a number above 0 and up to `MAX_ETA`.
    """
    if not 0 < eta <= MAX_ETA:
        raise PlanError(f"--eta: expected a number above 0 and up to {MAX_ETA:g}, found {eta:g}")


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
        updates: One directory per copy, in any order: an update, or a checkpoint that any tool trained from the copy.
        state: The server's secret state, a directory.
        out: A new directory for the checkpoint.
        eta: Server step size η.
        checkpoint: Where the round's checkpoint is now, if it has moved since `preprocess`.
        dtype: Storage dtype of the result (default: each tensor's own, as in the run's first checkpoint). Between rounds,
            float32 keeps what bfloat16 would round away.
        device: Where the arithmetic runs, cpu or cuda. Both agree up to float32 rounding.

    Returns:
        `out`.

    Raises:
        UpdateError: An update is missing, given twice, of another run or round, or cannot be an update of this model.
        StateError: No round was published from this state, its checkpoint has changed, or the state is in use.
        FileError: The checkpoint cannot be read, or `out` exists or cannot be written.
    """
    from mpunlearn.architecture import Architecture
    from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint
    from mpunlearn.server.aggregate import Aggregation, match
    from mpunlearn.server.publisher import Publisher
    from mpunlearn.server.state import ServerState, locked
    from mpunlearn.server.stream import arithmetic_device

    check_eta(eta)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise PlanError(f"--dtype: expected one of {', '.join(FLOAT_DTYPES)}, found {dtype}")
    arithmetic, state, out = arithmetic_device(device), as_path(state, "--state"), as_path(out, "--out")
    with locked(state):
        server = ServerState(state)
        if not server.rounds:
            raise StateError(f"{server.path}: no round was published from this state; run `preprocess` first")
        record = server.rounds[-1]
        source = Checkpoint(as_path(checkpoint or record.checkpoint, "--checkpoint"))
        architecture = Architecture.of(source)
        roles = architecture.tensor_roles(source)
        if set(roles) != set(record.dtypes):
            raise StateError(f"{source.path}: is not the model that round {record.round} was published from")
        publisher = Publisher(server.secret, record, architecture, arithmetic)
        received = match(updates, server.run, record)
        specs = {name: (FLOAT_DTYPES[dtype or record.dtypes[name]], source.tensors[name].shape) for name in roles}
        Aggregation(source, record, architecture, publisher, received, eta).write(out, specs)
        server.close()
    return out
