"""The client's verbs on a network: make keys, connect, do the jobs.

    mpunlearn client key --work WORK                                            once; hand WORK/client.json to the server
    mpunlearn client join invitation.json --work WORK --forget forget.jsonl     connect, and do the jobs as well
    mpunlearn client join invitation.json --spool SPOOL                         connect only: in a container, say
    mpunlearn client work --spool SPOOL --work WORK --forget … --policy …       do the jobs only

Connecting runs code that the server sends; it sees the spool folder. The jobs are done by this program, which reads the
forget set and follows the policy. Together or apart they speak through the spool folder alone.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from mpunlearn.client.network.policy import Policy
from mpunlearn.client.network.supernode import SuperNode
from mpunlearn.client.network.worker import POLL_SECONDS, Worker
from mpunlearn.client.resources import Resources
from mpunlearn.errors import PlanError, StateError
from mpunlearn.lm.sources import Data
from mpunlearn.progress import say
from mpunlearn.protocol.flower.keys import client_keys, read_invitation

LINGER_SECONDS = 3.0
"""Seconds in which a node carries the last answer after the end of a run."""
PATIENCE = 3
"""Starts of the node after which a person is told."""


def key(*, work: str | Path = "mpu-client") -> Path:
    """Makes a client's keys, where there are none.

    Args:
        work: the client's own folder.

    Returns:
        WORK/client.json, the public part, which the server needs.

    Raises:
        StateError: the keys that are there are damaged.
    """
    work = Path(work)
    client_keys(work)
    return work / "client.json"


def join(
    invitation: str | Path,
    *,
    work: str | Path = "mpu-client",
    spool: str | Path | None = None,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
    policy: str | Path | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
) -> str:
    """Connects to a run, and does its jobs where a forget set is given.

    Args:
        invitation: the server's invitation.json.
        work: the client's own folder, with its keys.
        spool: the folder that the courier sees (default: WORK/spool).
        forget: what to forget, as for `unlearn`; without it, jobs are left to `client work`.
        retain: what to keep, likewise.
        policy: TOML file of what the server may ask (default: the policy's own defaults).
        data: columns and places of the examples.
        resources: memory, precision and loggers of training.

    Returns:
        How the run ended.

    Raises:
        PlanError: the invitation or the policy cannot be read, or the client takes part in another run.
        NetworkError: Flower is not installed.
        MPUError: as `unlearn` does.
    """
    work = Path(work)
    spool = Path(spool) if spool is not None else work / "spool"
    invited = read_invitation(invitation)
    client_keys(work)
    worker = None
    if forget is not None:
        limits = Policy(invited.server_key) if policy is None else Policy.read(policy)
        worker = Worker(spool, work, limits, forget=forget, retain=retain, data=data, resources=resources, say=say)
    elif policy is not None or retain is not None:
        raise PlanError("--policy, --retain: belong to the jobs; give --forget, or leave them to `client work`")
    for name in ("jobs", "results"):
        (spool / name).mkdir(parents=True, exist_ok=True)
    node = SuperNode(work / "flower", spool, invited, work / "node.key")
    try:
        return _until_the_end(lambda: worker.step() if worker is not None else None, node)
    finally:
        node.stop()


def work(
    *,
    spool: str | Path,
    policy: str | Path,
    forget: str | Path,
    work: str | Path = "mpu-client",
    retain: str | Path | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
) -> str:
    """Does the jobs that `client join` puts into a spool folder.

    Args:
        spool: the folder that the courier sees.
        policy: TOML file of what the server may ask; server_key, as the invitation has it, must be there.
        forget: what to forget, as for `unlearn`.
        work: the client's own folder.
        retain: what to keep, likewise.
        data: columns and places of the examples.
        resources: memory, precision and loggers of training.

    Returns:
        How the run ended.

    Raises:
        PlanError: the policy cannot be read, or the client takes part in another run.
        MPUError: as `unlearn` does.
    """
    worker = Worker(
        Path(spool),
        Path(work),
        Policy.read(policy),
        forget=forget,
        retain=retain,
        data=data,
        resources=resources,
        say=say,
    )
    return _until_the_end(worker.step, None)


def _until_the_end(step: Callable[[], str | None], node: SuperNode | None) -> str:
    """Does jobs and keeps the node running, until the server says that the run is over."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    starts = 0
    try:
        while True:
            if node is not None and node.ensure_running():
                starts += 1
                if starts == PATIENCE:
                    say(
                        f"not connected yet, trying on: is the server up, and has it this client's client.json? See {node.log}"
                    )
            outcome = step()
            if outcome is not None:
                time.sleep(LINGER_SECONDS if node is not None else 0)
                return outcome
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise StateError("stopped; go on with the same command") from None
