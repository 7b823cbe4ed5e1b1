"""The commands `server start` and `server resume`, which serve a run to clients over a network.

    mpunlearn server start MODEL --run RUN --objective npo --copies 3
    mpunlearn server resume RUN

`start` writes the plan to RUN/plan.json and continues like `resume`, which starts Flower, writes RUN/invitation.json
for the clients, and serves until the last round is complete. RUN holds the complete state of the run; Flower's own
state can be lost at any time.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from mpunlearn.errors import PlanError, StateError
from mpunlearn.extras import needs
from mpunlearn.files import as_path
from mpunlearn.presets import ADVICE
from mpunlearn.progress import say
from mpunlearn.protocol.plan import Training
from mpunlearn.server.federation import Federation
from mpunlearn.server.perturbation import Perturbation

if TYPE_CHECKING:
    from mpunlearn.server.plan import Service

POLL_SECONDS = 0.2


def start(
    checkpoint: str | Path,
    *,
    run: str | Path,
    trust: str | None = None,
    host: str = "127.0.0.1",
    port: int = 9100,
    listen: str | None = None,
    insecure: bool = False,
    superlink: str | None = None,
    base: str | Path | None = None,
    stand_in: str | Path | None = None,
    lineage: str | Path | None = None,
    rounds: int = 5,
    eta: float = 1.0,
    device: str = "cpu",
    perturbation: Perturbation | None = None,
    training: Training | None = None,
    federation: Federation | None = None,
) -> Path:
    """Serves a run to clients on other machines until its last round is complete.

    Args:
        checkpoint: The server's model, a Hugging Face checkpoint directory.
        run: The run's directory, private to the server. If it holds an unfinished run with the same options, that run
            is resumed.
        trust: The client.json files of the clients, separated by commas. Only these clients may take part.
        host: Address at which clients reach this machine. The TLS certificate is issued for it.
        port: Port at which clients reach this machine.
        listen: Address to listen on, such as 0.0.0.0 behind a router (default: --host).
        insecure: Use neither TLS nor keys, for trials on a loopback address. The first clients to connect are accepted.
        superlink: HOST:PORT of a running SuperLink to use instead of starting one. It must be on this machine, without
            TLS.
        base: The public checkpoint that the model was fine-tuned from. If given, the noise level is relative to the
            task vector (the model's weights minus the base's).
        stand_in: A checkpoint of the same shapes to make the copies of, instead of the model. The updates are applied
            to the model.
        lineage: Directory of the secret key of the common noise, shared by all runs of the model and of its successors
            (default: in the user's data folder, found by the model's digest).
        rounds: Number of rounds R.
        eta: Server step size η.
        device: Device of the server's computations, cpu or cuda.
        perturbation: Number of copies, noise level, reparameterization.
        training: The objective and its hyperparameters, which each client checks against its policy.
        federation: The clients, and what happens if one does not answer in time.

    Returns:
        The unlearned checkpoint, RUN/final.

    Raises:
        PlanError: `run` holds a run with different options, or an option has an invalid value.
        MissingPackageError: The extra network is not installed.
        NetworkError: The port is in use, or the run cannot continue without a client.
        MPUError: As raised by `preprocess` and `postprocess`.
    """
    needs("network", "server start")
    from mpunlearn.server.network.folder import RunFolder
    from mpunlearn.server.network.superlink import check_port
    from mpunlearn.server.plan import RunPlan, check_models, resolved

    federation = federation or Federation()
    folder = RunFolder(as_path(run, "--run"))
    plan = RunPlan(
        checkpoint=str(as_path(checkpoint, "checkpoint").resolve()),
        base=resolved(base, "--base"),
        stand_in=resolved(stand_in, "--stand-in"),
        lineage=resolved(lineage, "--lineage"),
        rounds=rounds,
        eta=eta,
        device=device,
        perturbation=perturbation or Perturbation(),
        training=training or Training(),
        service=_service(host, port, listen or host, insecure, superlink, trust, federation),
    )
    check_models(plan)
    _check_folder(folder.path, folder.plan)
    if superlink is None and not folder.plan.exists():
        check_port(listen or host, port)  # not when resuming: a previous server of this run may still hold it
    if plan.perturbation.copies > 1 and plan.perturbation.common_noise != 0 and federation.assign == "all":
        say(ADVICE)
    plan.continuing(folder.plan).pin(folder.plan)
    return resume(folder.path)


def resume(run: str | Path) -> Path:
    """Resumes an interrupted run, at whatever point it was interrupted.

    Args:
        run: The run's directory.

    Returns:
        The unlearned checkpoint, RUN/final.

    Raises:
        StateError: There is no run in the directory, or another process is serving it.
        NetworkError: As for `start`.
    """
    needs("network", "server resume")
    from mpunlearn.protocol.flower.keys import Invitation, invite
    from mpunlearn.server.network.coordinator import Coordinator
    from mpunlearn.server.network.folder import RunFolder
    from mpunlearn.server.network.superlink import SuperLink
    from mpunlearn.server.plan import RunPlan
    from mpunlearn.server.state import locked

    folder = RunFolder(as_path(run, "run"))
    plan = RunPlan.read(folder.plan)
    coordinator = Coordinator(plan, folder.path)
    service, final = coordinator.service, folder.final
    if folder.done.exists() and final.is_dir():
        return final
    with locked(folder.path):
        folder.done.unlink(missing_ok=True)
        link = SuperLink(folder, plan)
        try:
            link.start()
            address = service.superlink or f"{service.host}:{service.port}"
            invite(folder.invitation, Invitation(address, coordinator.identity.public, link.ca))
            say(f"serving at {address}; clients join with {folder.invitation}")
            while not coordinator.step():
                time.sleep(POLL_SECONDS)
            coordinator.farewell("complete")
        finally:
            link.stop()
    if not final.is_dir():
        raise StateError(f"{folder.path}: the run is complete, but its final model was removed; use a new --run")
    return final


def _service(
    host: str,
    port: int,
    listen: str,
    insecure: bool,
    superlink: str | None,
    trust: str | None,
    federation: Federation,
) -> "Service":
    """Validates the network options and combines them into a `Service`.

    Raises:
        PlanError: an option has an invalid value, or two options contradict each other.
    """
    from mpunlearn.protocol.flower.keys import loopback, read_keys
    from mpunlearn.server.plan import Service

    if not 0 < port < 65536:
        raise PlanError(f"--port: expected a number from 1 to 65535, found {port}")
    if insecure == (trust is not None):
        raise PlanError("give --trust with the client.json of every client, or --insecure for a trial on this machine")
    for address in (host, listen) if insecure else ():
        if not loopback(address):
            raise PlanError(f"--insecure: only allowed on a loopback address such as 127.0.0.1, found {address}")
    if superlink is not None and not insecure:
        raise PlanError("--superlink: is accessed without TLS, so --insecure is required, too")
    if superlink is not None:
        name, _, number = superlink.rpartition(":")
        if not (loopback(name) and number.isdigit()):
            raise PlanError(f"--superlink: expected 127.0.0.1:PORT, found {superlink}")
    keys = [read_keys(path) for path in trust.split(",")] if trust is not None else []
    if keys and len(keys) != federation.clients:
        raise PlanError(
            f"--trust: expected {federation.clients} files for --clients {federation.clients}, found {len(keys)}"
        )
    if len({key.key for key in keys}) != len(keys):
        raise PlanError("--trust: lists the same client twice; give one client.json per client")
    return Service(host, port, listen, superlink, keys, federation)


def _check_folder(run: Path, plan: Path) -> None:
    """Checks that the directory holds nothing but a run.

    Raises:
        PlanError: it is a file, or it contains other files.
    """
    if run.exists() and not run.is_dir():
        raise PlanError(f"--run {run}: is a file; expected a directory for the run")
    if not plan.exists() and run.is_dir() and any(entry.name != ".plan.json.partial" for entry in run.iterdir()):
        raise PlanError(f"--run {run}: contains files that do not belong to a run; choose a new directory")
