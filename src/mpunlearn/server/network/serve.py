"""The server's verbs on a network: start a run, go on with it, look at it.

    mpunlearn server start MODEL --run RUN --objective npo --copies 3
    mpunlearn server resume RUN
    mpunlearn server status RUN --watch true

`start` pins the plan in RUN/plan.json and then does what `resume` does: it brings Flower up, writes RUN/invitation.json for the
clients, and serves until the last round is complete. All of the run's state is in RUN; Flower's own may be lost at any time.
"""

import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import NetworkError, PlanError, StateError
from mpunlearn.progress import say
from mpunlearn.protocol.flower.keys import ClientKeys, Invitation, invite, loopback, read_keys
from mpunlearn.protocol.plan import Training, pin
from mpunlearn.server.federation import Federation
from mpunlearn.server.network.coordinator import Coordinator
from mpunlearn.server.network.status import _plan
from mpunlearn.server.network.superlink import SuperLink
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.rounds import Rounds
from mpunlearn.server.state import locked

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
    rounds: int = 5,
    eta: float = 1.0,
    device: str = "cpu",
    perturbation: Perturbation | None = None,
    training: Training | None = None,
    federation: Federation | None = None,
) -> Path:
    """Serves a run to clients on other machines, until its last round is complete.

    Args:
        checkpoint: the server's model, a checkpoint directory.
        run: the run's directory, the server's alone. If it holds an unfinished run with the same arguments, that goes on.
        trust: the clients' public files client.json, separated by commas; only these may take part.
        host: address that clients reach this machine by; the certificate is made for it.
        port: port that they reach it at.
        listen: address to listen on, such as 0.0.0.0 behind a router (default: --host).
        insecure: without TLS and keys, for trials on a loopback address; whoever comes first takes part.
        superlink: HOST:PORT of a SuperLink that runs on this machine without TLS, instead of starting one.
        base: the public checkpoint that the model was trained from; the noise is then relative to the task vector.
        rounds: number R of rounds.
        eta: server step size η.
        device: where the server's arithmetic runs, cpu or cuda.
        perturbation: number of copies, noise level, reparameterization.
        training: objective and hyper-parameters, which the clients follow as far as their policies allow.
        federation: who takes part, and what happens when one does not answer.

    Returns:
        The unlearned checkpoint, RUN/final.

    Raises:
        PlanError: `run` holds a run with other arguments, or an option has an impossible value.
        NetworkError: Flower is not installed, or the run cannot go on without a client that does not answer.
        MPUError: as `preprocess` and `postprocess` do.
    """
    run, source = Path(run), Path(checkpoint)
    perturbation, training = perturbation or Perturbation(), training or Training()
    federation = federation or Federation()
    if rounds < 1:
        raise PlanError(f"--rounds: expected at least 1, found {rounds}")
    if not 0 < port < 65536:
        raise PlanError(f"--port: expected a number from 1 to 65535, found {port}")
    for address in (host, listen or host) if insecure else ():
        if not loopback(address):
            raise PlanError(f"--insecure: only on a loopback address such as 127.0.0.1, found {address}")
    if insecure == (trust is not None):
        raise PlanError(
            "give --trust with the client.json of every client, or --insecure true for a trial on this machine"
        )
    if superlink is not None and not insecure:
        raise PlanError("--superlink: is reached without TLS; give --insecure true, too")
    if superlink is not None and not (
        loopback(superlink.rpartition(":")[0]) and superlink.rpartition(":")[2].isdigit()
    ):
        raise PlanError(f"--superlink: expected 127.0.0.1:PORT, found {superlink}")
    keys = [dataclasses.asdict(read_keys(path)) for path in trust.split(",")] if trust is not None else []
    if keys and len(keys) != federation.clients:
        raise PlanError(f"--trust: expected the files of {federation.clients} --clients, found {len(keys)}")
    if len({key["key"] for key in keys}) != len(keys):
        raise PlanError("--trust: names the same client twice; a client is one party")
    for model in (source, *([Path(base)] if base is not None else [])):
        opened = Checkpoint(model)
        Architecture.of(opened).tensor_roles(opened)
    if (
        not (run / "plan.json").exists()
        and run.exists()
        and any(file.name != ".plan.json.partial" for file in run.iterdir())
    ):
        raise PlanError(f"--run {run}: holds something else than a run; name a directory of its own for the run")
    plan = {
        "checkpoint": str(source.resolve()),
        "base": str(Path(base).resolve()) if base is not None else None,
        "rounds": rounds,
        "eta": eta,
        "device": device,
        "host": host,
        "port": port,
        "listen": listen or host,
        "superlink": superlink,
        "clients": keys,
        "perturbation": perturbation.plain(),
        "training": training.plain(),
        "federation": {**dataclasses.asdict(federation), "weights": _listed(federation.weights)},
    }
    pin(run / "plan.json", plan, run)
    return resume(run)


def resume(run: str | Path) -> Path:
    """Goes on with a run that was interrupted, wherever it was.

    Args:
        run: the run's directory.

    Returns:
        The unlearned checkpoint, RUN/final.

    Raises:
        StateError: there is no run, or another process serves it.
        NetworkError: as for `start`.
    """
    run = Path(run)
    plan = _plan(run)
    keys = [ClientKeys(**client) for client in plan["clients"]]
    coordinator = coordinate(run, plan)
    final = run / "final"
    host, port = plan["host"], plan["port"]
    if (coordinator.mail / "done").exists() and final.is_dir():
        return final
    with locked(run):
        (coordinator.mail / "done").unlink(missing_ok=True)
        attached = plan["superlink"]
        link = SuperLink(run / "flower", coordinator.mail, host, plan["listen"], port, keys or None, attached)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            link.start()
            address = attached or f"{host}:{port}"
            invite(run / "invitation.json", Invitation(address, coordinator.identity.public, link.ca))
            say(f"clients join with {run / 'invitation.json'}")
            while not coordinator.step():
                try:
                    link.ensure_running()
                except NetworkError as error:  # Flower's trouble is not the run's
                    say(str(error))
                time.sleep(POLL_SECONDS)
            coordinator.farewell("complete")
        except KeyboardInterrupt:
            raise StateError(f"stopped; go on with `mpunlearn server resume {run}`") from None
        finally:
            link.stop()
    if not final.is_dir():
        raise StateError(f"{run}: the run is complete, but its final model has been removed; start another --run")
    return final


def coordinate(run: Path, plan: dict[str, Any]) -> Coordinator:
    """The coordinator of a run with a pinned plan."""
    base = Path(plan["base"]) if plan["base"] is not None else None
    perturbation, training = Perturbation(**plan["perturbation"]), Training(**plan["training"])
    rounds = Rounds(
        run,
        run / "final",
        Path(plan["checkpoint"]),
        base,
        plan["rounds"],
        plan["eta"],
        plan["device"],
        perturbation,
    )
    trusted = [client["key"] for client in plan["clients"]]
    return Coordinator(rounds, Federation(**plan["federation"]), training, trusted, say)


def _listed(values: tuple[float, ...] | None) -> list[float] | None:
    return list(values) if values is not None else None
