"""Both parties in one process, apart on disk, and resumable.

    RUN/server/      the server's alone (mode 0700): plan, secret state, θ between rounds
    RUN/client/      the client's alone (mode 0700): digests of its files, its memory of the round-1 copies
    RUN/exchange/    what crosses between them: round-1/copies/copy-1 …, round-1/updates/copy-1 …
    RUN/final/       the unlearned checkpoint, the server's

The journal is the tree itself: every directory appears by one rename when it is whole, and a round is closed in the server's
state after its result has its name. So a run killed anywhere goes on with what is missing, and ends with the same bytes where
the client trains alike (the same machine and number of threads); the server's own bytes are the same everywhere. Between
rounds θ is kept in float32. A copy is deleted when its update is there: one round's copies are the most that is ever held.
"""

import math
import shutil
from pathlib import Path
from typing import Any

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint
from mpunlearn.client import Client, Data, Resources
from mpunlearn.errors import CheckpointError, PlanError, StateError
from mpunlearn.lm.processes import processes
from mpunlearn.progress import progress
from mpunlearn.protocol.plan import Training, pin
from mpunlearn.server import Perturbation
from mpunlearn.server.rounds import Rounds
from mpunlearn.server.state import locked


def run(
    checkpoint: str | Path,
    *,
    forget: str | Path,
    out: str | Path,
    retain: str | Path | None = None,
    base: str | Path | None = None,
    rounds: int = 5,
    eta: float = 1.0,
    keep_exchange: bool = False,
    device: str = "cpu",
    perturbation: Perturbation | None = None,
    training: Training | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
) -> Path:
    """Unlearns under MPU: `rounds` times preprocess, unlearn on every copy, and postprocess.

    Args:
        checkpoint: the server's model, a checkpoint directory.
        forget: what to forget: a file, a folder that `datasets` saved, a benchmark such as tofu/forget10, or a data set's name.
        out: the run's directory. If it holds an unfinished run with the same arguments, that run goes on.
        retain: what to keep, likewise; objectives with a retain term need it.
        base: the public checkpoint that the model was trained from; the noise is then relative to the task vector.
        rounds: number R of rounds.
        eta: server step size η.
        keep_exchange: keep every round's copies and updates instead of deleting them when the round is closed.
        device: where the server's arithmetic runs, cpu or cuda. Training takes a GPU wherever there is one.
        perturbation: number of copies, noise level, reparameterization.
        training: objective and hyper-parameters.
        data: columns and places of the examples.
        resources: memory, precision, checkpoints and loggers of training.

    Returns:
        The unlearned checkpoint, OUT/final.

    Raises:
        PlanError: `out` holds a run with other arguments, or an option has an impossible value.
        MPUError: as `preprocess`, `unlearn` and `postprocess` do.
    """
    out, source = Path(out), Path(checkpoint)
    perturbation, training = perturbation or Perturbation(), training or Training()
    if rounds < 1:
        raise PlanError(f"--rounds: expected at least 1, found {rounds}")
    if not math.isfinite(eta):
        raise PlanError(f"--eta: expected a number, found {eta}")
    if processes() > 1:
        raise PlanError("`run` is one process; to train on several, start `unlearn` under torchrun for every copy")
    memory = out / "client" / "memory"
    client = Client(forget=forget, retain=retain, memory=memory, training=training, data=data, resources=resources)
    for model in (source, *([Path(base)] if base is not None else [])):
        opened = Checkpoint(model)
        Architecture.of(opened).tensor_roles(opened)
        if out.resolve() in (model.resolve(), *model.resolve().parents):
            raise PlanError(f"--out {out}: holds the model {model} itself; name a directory of its own for the run")
    plans: dict[Path, dict[str, Any]] = {
        out / "server" / "plan.json": {
            "checkpoint": str(source.resolve()),
            "base": str(Path(base).resolve()) if base is not None else None,
            "rounds": rounds,
            "eta": eta,
            "perturbation": perturbation.plain(),
            "training": training.plain(),
        },
        out / "client" / "plan.json": dict(client.digests),
    }
    _check_room(out, source, perturbation, rounds, client.objective.reference_model)
    _pin(out, plans)
    server, final = out / "server", out / "final"
    work = Rounds(server, final, source, Path(base) if base is not None else None, rounds, eta, device, perturbation)
    with locked(server):
        for number in progress(range(1, rounds + 1), "rounds"):
            _round(number, work, out / "exchange", client, keep_exchange)
    if not final.is_dir():
        raise StateError(f"{out}: the run is complete, but its final model has been removed; start another --out")
    return final


def _round(number: int, rounds: Rounds, exchange: Path, client: Client, keep_exchange: bool) -> None:
    """What is missing of one round, and nothing of it left over."""
    folder = exchange / f"round-{number}"
    if not rounds.closed(number):
        rounds.publish(number, folder / "copies")
        updates = [folder / "updates" / f"copy-{copy}" for copy in range(1, rounds.perturbation.copies + 1)]
        for update in progress(updates, f"round {number} of {rounds.rounds}: copies"):
            copy = folder / "copies" / update.name
            if not update.exists():
                client.unlearn(copy, update)
            if not keep_exchange:
                shutil.rmtree(copy, ignore_errors=True)
        rounds.aggregate(number, updates)
    if not keep_exchange:
        shutil.rmtree(folder, ignore_errors=True)
    rounds.tidy(number)


def _pin(out: Path, plans: dict[Path, dict[str, Any]]) -> None:
    """Writes the plans of a new run, or checks that those of an old one are the same."""
    server = next(iter(plans))
    if not server.exists() and any((out / name).exists() for name in ("final", "exchange", "client")):
        raise PlanError(f"--out {out}: holds something else than a run; name a directory of its own for the run")
    for path, plan in plans.items():
        pin(path, plan, out)


def _check_room(out: Path, checkpoint: Path, perturbation: Perturbation, rounds: int, references: bool) -> None:
    """Refuses a run that would fill the disk: the copies or the updates of one round, and θ before and after it; and the
    copies of round 1, where the client keeps them as references.

    Raises:
        CheckpointError: there is less space than that.
    """
    tensors = Checkpoint(checkpoint).tensors.values()
    entries = sum(info.nbytes // info.dtype.itemsize for info in tensors)
    dtype = perturbation.publish_dtype
    copy = entries * FLOAT_DTYPES[dtype].itemsize if dtype else sum(info.nbytes for info in tensors)
    update = theta = 4 * entries
    kept = perturbation.copies * copy if references else 0
    needed = perturbation.copies * max(copy, update) + min(copy, update) + theta * min(rounds, 2) + kept
    existing = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{out}: the run needs up to {needed / 1e9:.2f} GB and {existing} has {free / 1e9:.2f} GB free; free some space, "
            "name an --out elsewhere, or take fewer --copies"
        )
