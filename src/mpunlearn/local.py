"""Both parties in one process, apart on disk, and resumable.

    RUN/server/      the server's alone (mode 0700): plan, secret state, θ between rounds
    RUN/client/      the client's alone (mode 0700): digests of its data, its memory of the copies of round 1
    RUN/exchange/    what crosses between them: round-1/copies/copy-1 …, round-1/updates/copy-1 …
    RUN/final/       the unlearned checkpoint, the server's

The directory tree is its own journal: every directory becomes visible atomically once it is complete, and a round is closed in
the server's state after its result has its name. A run that was killed anywhere goes on with what is missing. It ends with the
same bytes, as long as processor, library versions and number of threads are the same. Between rounds θ is kept in float32. A
copy is deleted when its update exists, so at most the copies of one round are held.

This is the only module that knows both parties. Its name is not `run`, so that `mpunlearn.run` is always the function.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpunlearn.client.resources import Resources
from mpunlearn.errors import FileError, PlanError, StateError
from mpunlearn.files import as_path
from mpunlearn.lm.sources import Data
from mpunlearn.progress import progress
from mpunlearn.protocol.plan import Training, pin
from mpunlearn.server.perturbation import Perturbation

if TYPE_CHECKING:
    from mpunlearn.client.client import Client
    from mpunlearn.server.plan import RunPlan
    from mpunlearn.server.rounds import Rounds


@dataclass(frozen=True)
class ClientPlan:
    """RUN/client/plan.json: which data the run was started with."""

    forget: str
    """SHA-256 of the forget set."""
    retain: str
    """SHA-256 of the retain set."""


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
    """Unlearns with both parties in one process; an interrupted run goes on with the same command.

    In each round, the server publishes the copies, the client unlearns on each of them, and the server aggregates the updates.

    Args:
        checkpoint: The server's model, a checkpoint directory.
        forget: What to forget: a file, a folder that `datasets` saved, a benchmark such as tofu/forget10, or hub:OWNER/NAME.
        out: The run's directory. If it holds an unfinished run with the same options, that run goes on.
        retain: What to keep, in the same form. Objectives with a retain term need it.
        base: The public checkpoint that the model was trained from. The noise is then relative to the task vector.
        rounds: Number R of rounds.
        eta: Server step size η.
        keep_exchange: Keep the copies and updates of every round instead of deleting them when the round is closed.
        device: Where the server's arithmetic runs, cpu or cuda. Training uses a GPU wherever there is one.
        perturbation: Number of copies, noise level, reparameterization.
        training: The objective and its hyper-parameters.
        data: Columns and locations of the examples.
        resources: Memory, precision, checkpoints and trackers of training.

    Returns:
        The unlearned checkpoint, OUT/final.

    Raises:
        PlanError: `out` holds a run with other options, or an option has an impossible value.
        MPUError: As `preprocess`, `unlearn` and `postprocess` do.
    """
    from mpunlearn.client.client import Client
    from mpunlearn.lm.processes import processes
    from mpunlearn.server.plan import RunPlan, check_models
    from mpunlearn.server.rounds import Rounds
    from mpunlearn.server.state import locked

    out, source = as_path(out, "--out"), as_path(checkpoint, "checkpoint")
    plan = RunPlan(
        checkpoint=str(source.resolve()),
        base=str(as_path(base, "--base").resolve()) if base is not None else None,
        rounds=rounds,
        eta=eta,
        device=device,
        perturbation=perturbation or Perturbation(),
        training=training or Training(),
    )
    if processes() > 1:
        raise PlanError("`run` is one process; to train on several, start `unlearn` under torchrun for every copy")
    memory = out / "client" / "memory"
    client = Client(forget=forget, retain=retain, memory=memory, training=plan.training, data=data, resources=resources)
    check_models(plan)
    _check_out(out, plan)
    if not (out / "server" / "plan.json").exists():
        _check_room(out, plan, client)
    plan.pin(out / "server" / "plan.json")
    pin(out / "client" / "plan.json", ClientPlan(**client.digests))
    server, final = out / "server", out / "final"
    work = Rounds(plan, server, final)
    with locked(server):
        for number in progress(range(1, rounds + 1), "rounds"):
            _round(number, work, out / "exchange", client, keep_exchange)
    if not final.is_dir():
        raise StateError(
            f"{out}: the run is complete, but its final model was removed; start a new run with another --out"
        )
    return final


def _round(number: int, rounds: "Rounds", exchange: Path, client: "Client", keep_exchange: bool) -> None:
    """Does what is missing of one round, and removes what is no longer needed."""
    folder = exchange / f"round-{number}"
    if not rounds.closed(number):
        rounds.publish(number, folder / "copies")
        updates = [folder / "updates" / f"copy-{copy}" for copy in range(1, rounds.plan.perturbation.copies + 1)]
        for update in progress(updates, f"round {number} of {rounds.plan.rounds}: copies"):
            copy = folder / "copies" / update.name
            if not update.exists():
                client.unlearn(copy, update)
            if not keep_exchange:
                shutil.rmtree(copy, ignore_errors=True)
        rounds.aggregate(number, updates)
    if not keep_exchange:
        shutil.rmtree(folder, ignore_errors=True)
    rounds.tidy(number)


def _check_out(out: Path, plan: "RunPlan") -> None:
    """Refuses a directory that holds the model, or anything else but a run.

    Raises:
        PlanError: it does.
    """
    for model in (plan.checkpoint, *([plan.base] if plan.base is not None else [])):
        if out.resolve() in (Path(model), *Path(model).parents):
            raise PlanError(f"--out {out}: holds the model {model} itself; name a directory of its own for the run")
    if out.exists() and not out.is_dir():
        raise PlanError(f"--out {out}: is a file; name a directory for the run")
    started = (out / "server" / "plan.json").exists()
    if not started and out.is_dir() and any(entry.name != "server" for entry in out.iterdir()):
        raise PlanError(f"--out {out}: holds something other than a run; name a directory of its own for the run")


def _check_room(out: Path, plan: "RunPlan", client: "Client") -> None:
    """Refuses a run that would fill the disk.

    Needed at once are the copies or the updates of one round, θ before and after it, and the copies of round 1 if the client
    keeps them as references.

    Raises:
        FileError: there is less space than that.
    """
    from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint

    tensors = Checkpoint(plan.checkpoint).tensors.values()
    entries = sum(info.nbytes // info.dtype.itemsize for info in tensors)
    copies, dtype = plan.perturbation.copies, plan.perturbation.publish_dtype
    copy = entries * FLOAT_DTYPES[dtype].itemsize if dtype else sum(info.nbytes for info in tensors)
    update = theta = 4 * entries
    kept = copies * copy if client.losses.reference_model else 0
    needed = copies * max(copy, update) + min(copy, update) + theta * min(plan.rounds, 2) + kept
    existing = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise FileError(
            f"{out}: the run needs up to {needed / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free; free some space, "
            "choose another --out, or take fewer --copies"
        )
