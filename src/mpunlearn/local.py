"""Runs all rounds of MPU with both parties in one process, but separated on disk. Runs can be resumed.

In each round, the server publishes m perturbed copies of its model θ, the client unlearns on each copy, and the server
aggregates the m updates into the next θ. The directory of a run:

    RUN/server/      private to the server (mode 0700): plan, secret state, θ between rounds (in float32)
    RUN/client/      private to the client (mode 0700): digests of its data, what it keeps of the copies of round 1
    RUN/exchange/    what the parties exchange: round-1/copies/copy-1 …, round-1/updates/copy-1 …
    RUN/final/       the unlearned checkpoint, which belongs to the server

There is no separate journal: every directory becomes visible atomically once it is complete, and a round is closed in
the server's state only after its result is in place. A run that was killed at any point can therefore continue with
whatever is missing. The final checkpoint is byte-identical as long as the processor, the library versions and the
number of threads are the same. A copy is deleted once its update exists, so only the copies of one round are on disk at
a time.

This is the only module that imports from both parties. It is not called `run`, so that `mpunlearn.run` always means the
function.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpunlearn.client.resources import Callback, Resources
from mpunlearn.errors import FileError, PlanError, StateError
from mpunlearn.extras import needs
from mpunlearn.files import as_path
from mpunlearn.lm.sources import Data, Source
from mpunlearn.progress import progress
from mpunlearn.protocol.plan import Training, pin
from mpunlearn.schema import parse
from mpunlearn.server.perturbation import Perturbation

if TYPE_CHECKING:
    from mpunlearn.client.client import Client
    from mpunlearn.client.recording import Recording
    from mpunlearn.server.plan import RunPlan
    from mpunlearn.server.rounds import Rounds


@dataclass(frozen=True)
class ClientPlan:
    """RUN/client/plan.json: the data that the run was started with."""

    forget: str
    """SHA-256 of the forget set."""
    retain: str
    """SHA-256 of the retain set."""
    decoys: str | None = None
    """SHA-256 of the decoys; None without decoys."""


def run(
    checkpoint: str | Path,
    *,
    forget: Source,
    out: str | Path,
    retain: Source | None = None,
    decoys: Source | None = None,
    base: str | Path | None = None,
    stand_in: str | Path | None = None,
    lineage: str | Path | None = None,
    rounds: int = 5,
    eta: float = 1.0,
    keep_exchange: bool = False,
    keep_models: bool = False,
    device: str = "cpu",
    perturbation: Perturbation | None = None,
    training: Training | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
    callback: Callback | None = None,
) -> Path:
    """Runs all rounds with both parties in one process. Repeat the same command to resume an interrupted run.

    A run, also a finished one, goes on with more rounds if the command is repeated with a larger number of rounds.
    In each round, the server publishes perturbed copies of the model, the client unlearns on each copy, and the server
    aggregates the updates.

    Args:
        checkpoint: The server's model, a Hugging Face checkpoint directory.
        forget: The data to forget: a file, a folder saved by `datasets`, a benchmark such as tofu/forget10, or
            hub:OWNER/NAME. Python programs can also give a list of texts or dicts, or a `datasets.Dataset`.
        out: The run's directory. If it holds a run with the same options, or with fewer rounds, that run is resumed.
        retain: The data to retain, in the same formats. Required by objectives with a retain term. Without such data, give
            auto: the answers of the model to its own questions, or auto:SOURCE: a random choice from a larger set.
        decoys: Data of the same kind that the model knows, in the same formats. It is unlearned along with the forget set,
            and hides which of the data that set consists of.
        base: The public checkpoint that the model was fine-tuned from. If given, the noise level is relative to the
            task vector (the model's weights minus the base's).
        stand_in: A checkpoint of the same shapes to make the copies of, instead of the model. The updates are applied
            to the model.
        lineage: Directory of the secret key of the common noise, shared by all runs of the model and of its successors
            (default: in the user's data folder, found by the model's digest).
        rounds: Number of rounds R. With more rounds than before, a finished run goes on from its final model, which it
            replaces. That model has the dtypes of the original; if these are float32, the result is the same as with so
            many rounds from the start, otherwise it was rounded once more.
        eta: Server step size η.
        keep_exchange: Keep the copies and updates of every round instead of deleting them when the round is closed.
        keep_models: Keep the model after every round, OUT/server/round-1 and so on, instead of deleting it when the next
            round is closed. They can be evaluated, for a report over rounds.
        device: Device of the server's computations, cpu or cuda. Training uses a GPU whenever there is one.
        perturbation: Number of copies, noise level, reparameterization.
        training: The objective and its hyperparameters.
        data: Columns and locations of the examples.
        resources: Memory, precision, checkpoints and experiment trackers of training.
        callback: Called after every optimizer step with its number and the losses.

    Returns:
        The unlearned checkpoint, OUT/final.

    Raises:
        PlanError: `out` holds a run with different options, or an option has an invalid value.
        MPUError: As `preprocess`, `unlearn` and `postprocess` do.
    """
    needs("client", "run")
    from mpunlearn.client.client import Client
    from mpunlearn.client.recording import Recording
    from mpunlearn.lm.processes import processes
    from mpunlearn.server.plan import RunPlan, check_models, resolved
    from mpunlearn.server.rounds import Rounds
    from mpunlearn.server.state import locked

    out, source = as_path(out, "--out"), as_path(checkpoint, "checkpoint")
    plan = RunPlan(
        checkpoint=str(source.resolve()),
        base=resolved(base, "--base"),
        stand_in=resolved(stand_in, "--stand-in"),
        lineage=resolved(lineage, "--lineage"),
        rounds=rounds,
        eta=eta,
        device=device,
        perturbation=perturbation or Perturbation(),
        training=training or Training(),
    )
    if processes() > 1:
        raise PlanError("`run` needs a single process; to train on several, run `unlearn` under torchrun on each copy")
    pinned = out / "server" / "plan.json"
    plan = plan.continuing(pinned)
    memory = out / "client" / "memory"
    client = Client(
        forget=forget,
        retain=retain,
        decoys=decoys,
        memory=memory,
        training=plan.training,
        data=data,
        resources=resources,
        callback=callback,
    )
    check_models(plan)
    _check_out(out, plan)
    if not pinned.exists():
        _check_room(out, plan, client, keep_models)
    plan.pin(pinned, extend=True)
    pin(out / "client" / "plan.json", parse(ClientPlan, client.digests))
    server, final = out / "server", out / "final"
    work = Rounds(plan, server, final)
    recording = Recording(out / "client", client.text_digests, out / "client" / "plan.json")
    with locked(server):
        work.extend()
        for number in progress(range(1, rounds + 1), "rounds"):
            _round(number, work, out / "exchange", client, recording, keep_exchange)
            if not keep_models:
                work.tidy(number)
    if not final.is_dir():
        raise StateError(
            f"{out}: the run is complete, but its final model was removed; start a new run with another --out"
        )
    return final


def _round(
    number: int, rounds: "Rounds", exchange: Path, client: "Client", recording: "Recording", keep_exchange: bool
) -> None:
    """Does whatever is missing of one round, and removes files that are no longer needed."""
    from mpunlearn.protocol.record.log import copied_event

    folder = exchange / f"round-{number}"
    if not rounds.closed(number):
        rounds.publish(number, folder / "copies")
        updates = [folder / "updates" / f"copy-{copy}" for copy in range(1, rounds.plan.perturbation.copies + 1)]
        for update in progress(updates, f"round {number} of {rounds.plan.rounds}: copies"):
            copy = folder / "copies" / update.name
            published = copied_event(copy)
            if not update.exists():
                recording.begin(published)
                client.unlearn(copy, update)
            recording.updated(published, update)
            if not keep_exchange:
                shutil.rmtree(copy, ignore_errors=True)
        rounds.aggregate(number, updates)
    if not keep_exchange:
        shutil.rmtree(folder, ignore_errors=True)


def _check_out(out: Path, plan: "RunPlan") -> None:
    """Checks that the output directory holds nothing but a run.

    Raises:
        PlanError: it is a file, or it contains the model, the lineage or other files.
    """
    inputs = {"model": plan.checkpoint, "base": plan.base, "stand-in": plan.stand_in, "lineage": plan.lineage}
    for what, path in inputs.items():
        if path is not None and out.resolve() in (Path(path), *Path(path).parents):
            raise PlanError(f"--out {out}: contains the {what} {path}; choose a separate directory for the run")
    if out.exists() and not out.is_dir():
        raise PlanError(f"--out {out}: is a file; expected a directory for the run")
    started = (out / "server" / "plan.json").exists()
    if not started and out.is_dir() and any(entry.name != "server" for entry in out.iterdir()):
        raise PlanError(f"--out {out}: contains files that do not belong to a run; choose a new directory")


def _check_room(out: Path, plan: "RunPlan", client: "Client", keep_models: bool) -> None:
    """Checks that there is enough disk space for the run.

    At its peak, a run holds the copies or the updates of one round, θ before and after the round (or after all rounds, if
    they are kept), and the copies of round 1 if the client keeps them as reference models.

    Raises:
        FileError: there is less free space than that.
    """
    from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint
    from mpunlearn.server.updates import update_bytes

    tensors = Checkpoint(plan.checkpoint).tensors.values()
    entries = sum(info.nbytes // info.dtype.itemsize for info in tensors)
    copies, dtype = plan.perturbation.copies, plan.perturbation.publish_dtype
    copy = entries * FLOAT_DTYPES[dtype].itemsize if dtype else sum(info.nbytes for info in tensors)
    theta, update = 4 * entries, update_bytes(Path(plan.checkpoint), plan.training)
    references = copies * copy if client.losses.reference_model else 0
    models = plan.rounds if keep_models else min(plan.rounds, 2)
    needed = copies * max(copy, update) + min(copy, update) + theta * models + references
    existing = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise FileError(
            f"{out}: the run needs up to {needed / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free; free some "
            "space, choose another --out, or use fewer --copies"
        )
