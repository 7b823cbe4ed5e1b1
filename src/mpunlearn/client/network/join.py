"""The client's commands for a run over a network: generate keys, connect, do the jobs.

    mpunlearn client key --work WORK                                           once; give WORK/client.json to the server
    mpunlearn client join invitation.json --work WORK --forget forget.jsonl    connect and do the jobs
    mpunlearn client join invitation.json --spool SPOOL                        connect only, for example in a container
    mpunlearn client work --spool SPOOL --work WORK --forget … --policy …      do the jobs only

A job is the server's signed request to unlearn on one copy of its model. Connecting runs code that the server sends,
the *courier*, which passes messages between the network and the spool folder. The jobs are done by this program, which
reads the forget set and enforces the policy. The two parts communicate only through the spool folder, even within one
command.
"""

import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpunlearn.client.resources import Resources
from mpunlearn.errors import PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path
from mpunlearn.lm.sources import Data
from mpunlearn.progress import Waiting, say

if TYPE_CHECKING:
    from mpunlearn.client.network.supernode import SuperNode
    from mpunlearn.client.network.worker import Worker
    from mpunlearn.protocol.flower.keys import Invitation

LINGER_SECONDS = 3.0
"""How long the node keeps running after the end of a run, to deliver the last answer."""
QUIET_SECONDS = 5.0
"""How long connecting may take before a message explains what it is waiting for."""


def key(*, work: str | Path = "mpu-client") -> Path:
    """Generates a client's keys, unless they already exist.

    Args:
        work: The client's own folder.

    Returns:
        WORK/client.json, the public part, which the server needs.

    Raises:
        StateError: The existing keys are damaged.
    """
    from mpunlearn.protocol.flower.keys import client_keys

    folder = as_path(work, "--work")
    client_keys(folder)
    return folder / "client.json"


def join(
    invitation: str | Path,
    *,
    work: str | Path = "mpu-client",
    spool: str | Path | None = None,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
    decoys: str | Path | None = None,
    policy: str | Path | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
) -> str:
    """Connects to a run, and does its jobs if a forget set is given.

    Args:
        invitation: The server's invitation.json.
        work: The client's own folder, with its keys.
        spool: The folder for exchanging messages with Flower (default: WORK/spool).
        forget: What to forget, as for `unlearn`. Without it, the jobs are left to `client work`.
        retain: What to keep, in the same form.
        decoys: Texts of the same kind that the model knows, in the same form. They are unlearned along with the forget set,
            and hide which of the texts it consists of.
        policy: A TOML file that limits what the server may ask for (default: the limits in docs/network.md).
        data: How to read the examples.
        resources: Memory, precision and trackers for training.

    Returns:
        How the run ended.

    Raises:
        PlanError: The invitation or the policy cannot be read.
        MissingPackageError: The extra network is not installed.
        MPUError: As for `unlearn`.
    """
    needs("network", "client join")
    if forget is not None:
        needs("client", "--forget")
    from mpunlearn.client.network.policy import Policy
    from mpunlearn.client.network.spool import make
    from mpunlearn.client.network.supernode import SuperNode
    from mpunlearn.client.network.worker import Worker
    from mpunlearn.protocol.flower.keys import client_keys, read_invitation

    folder = as_path(work, "--work")
    shared = as_path(spool, "--spool") if spool is not None else folder / "spool"
    invited = read_invitation(as_path(invitation, "invitation"))
    client_keys(folder)
    worker = None
    if forget is not None:
        limits = Policy(invited.server_key) if policy is None else Policy.read(policy)
        worker = Worker(
            shared, folder, limits, forget=forget, retain=retain, decoys=decoys, data=data, resources=resources
        )
    elif policy is not None or retain is not None or decoys is not None:
        raise PlanError(
            "--policy, --retain, --decoys: only used for doing jobs, which needs --forget; give --forget, or use "
            "`client work`"
        )
    make(shared)
    if worker is None:
        say(
            f"connecting only, without --forget: jobs are left to `mpunlearn client work --spool {shared}`; this ends with the "
            "run, or with Ctrl-C"
        )
    node = SuperNode(folder / "flower", shared, invited, folder / "node.key")
    try:
        return _until_the_end(worker, node, shared, invited)
    finally:
        node.stop()
        if worker is not None:
            worker.close()


def work(
    *,
    spool: str | Path,
    policy: str | Path,
    forget: str | Path,
    work: str | Path = "mpu-client",
    retain: str | Path | None = None,
    decoys: str | Path | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
) -> str:
    """Does the jobs that `client join` puts into a spool folder.

    Args:
        spool: The spool folder that was given to `client join`.
        policy: A TOML file that limits what the server may ask for. It must contain the server_key from the invitation.
        forget: What to forget, as for `unlearn`.
        work: The client's own folder.
        retain: What to keep, in the same form.
        decoys: Texts of the same kind that the model knows, in the same form. They are unlearned along with the forget set,
            and hide which of the texts it consists of.
        data: How to read the examples.
        resources: Memory, precision and trackers for training.

    Returns:
        How the run ended.

    Raises:
        PlanError: The policy cannot be read.
        MPUError: As for `unlearn`.
    """
    needs("client", "client work")
    from mpunlearn.client.network.policy import Policy
    from mpunlearn.client.network.worker import POLL_SECONDS, Worker

    limits = Policy.read(as_path(policy, "--policy"))
    worker = Worker(
        as_path(spool, "--spool"),
        as_path(work, "--work"),
        limits,
        forget=forget,
        retain=retain,
        decoys=decoys,
        data=data,
        resources=resources,
    )
    try:
        while (outcome := worker.step()) is None:
            time.sleep(POLL_SECONDS)
        return outcome
    finally:
        worker.close()


def _until_the_end(worker: "Worker | None", node: "SuperNode", spool: Path, invited: "Invitation") -> str:
    """Keeps the node running and does the jobs, until the server says that the run is over."""
    from mpunlearn.client.network.spool import outcome as outcome_of
    from mpunlearn.client.network.worker import POLL_SECONDS

    address = invited.address
    with Waiting(f"connecting to {address}", QUIET_SECONDS) as waiting:
        while True:
            node.ensure_running()
            outcome = worker.step() if worker is not None else outcome_of(spool, invited.server_key)
            if outcome is not None:
                time.sleep(LINGER_SECONDS)
                return outcome
            if not waiting.over and (any((spool / "jobs").iterdir()) or (worker is not None and worker.connected)):
                waiting.finish()
                say(f"connected to {address}")
            waiting.tick(lambda: _explain(address, node.log))
            time.sleep(POLL_SECONDS)


def _explain(address: str, log: Path) -> str:
    """Explains why there is no connection yet, as far as this side can tell."""
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), 2):
        return (
            f"{address} responds, but has not accepted this client yet; retrying: does the server have this client's "
            f"client.json? See {log}"
        )
    return f"nothing is listening at {address} yet; retrying: is the server up, and is the address right? See {log}"
