"""The command `doctor`: checks whether a run can start, and says what to do if not.

Each check is a function that returns what it found and what to do. A check that fails for an unforeseen reason is
itself a finding, so that the others are still made.

Not covered: whether the model fits into memory and on the disk, which `mpunlearn plan` estimates.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mpunlearn.doctor import machine, parties
from mpunlearn.doctor.findings import Finding, Health, failed, ok, warning
from mpunlearn.errors import MPUError, NotReadyError, PlanError
from mpunlearn.files import as_path, data_folder

if TYPE_CHECKING:
    from mpunlearn.server.plan import RunPlan

Check = tuple[str, Callable[[], Finding | Iterable[Finding]]]
"""The name of a check, and its function."""


def doctor(
    run: str | Path | None = None,
    *,
    store: str | None = None,
    invitation: str | Path | None = None,
    work: str | Path = "mpu-client",
    host: str | None = None,
    port: int | None = None,
) -> Health:
    """Checks whether this machine can start a run: libraries, hardware, keys, certificates, ports, stores.

    Args:
        run: The directory of a run, in one process or over a network, whose keys, certificates and port are checked, too.
        store: A folder or s3://BUCKET/PREFIX to check (default: that of the run).
        invitation: For a client: the server's invitation.json, to check whether the server is reachable.
        work: For a client: its own folder, whose keys are checked if there is an invitation.
        host: Address at which a server would listen (default: that of the run, or 127.0.0.1).
        port: Port at which a server would listen (default: that of the run, or 9100).

    Returns:
        The findings. The exit code is 0 if a run can start, and 4 if a check failed.

    Raises:
        NotReadyError: A check failed.
        PlanError: The port is not a port.
    """
    if port is not None and not 0 < port < 65536:
        raise PlanError(f"--port: expected a number from 1 to 65535, found {port}")
    folder = as_path(run, "run") if run is not None else None
    here = Path() if folder is None else folder
    checks: list[Check] = []
    plan: RunPlan | None = None
    if folder is not None:
        plan, finding = _plan(folder)
        checks.append(("run", lambda: finding))
    service = plan.service if plan is not None else None
    if service is not None:
        host, port = host or service.listen, port or service.port
        store = store or service.federation.store
    networked = service is not None or invitation is not None
    checks += [
        ("libraries", machine.libraries),
        ("PyTorch", machine.torch_build),
        ("Flower", lambda: machine.flower(networked)),
        ("isolation", _isolation),
        ("memory", machine.memory),
        ("disk", lambda: machine.disk(here)),
        ("clock", lambda: machine.clock(here)),
    ]
    lineages = Path(plan.lineage) if plan is not None and plan.lineage else data_folder() / "lineages"
    if invitation is None and lineages.is_dir():
        checks.append(("lineages", lambda: parties.permissions(lineages, "lineages")))
    if folder is not None:
        checks.append(("permissions", lambda: parties.permissions(folder, "permissions")))
        checks.append(("certificates", lambda: parties.certificates(folder)))
    if invitation is None and (plan is None or (service is not None and service.superlink is None)):
        checks.append(("port", lambda: _port(folder, host or "127.0.0.1", port or 9100, networked)))
    if store is not None:
        url = store
        checks.append(("store", lambda: parties.store(url)))
    if invitation is not None:
        invited = as_path(invitation, "--invitation")
        client = as_path(work, "--work")
        checks.append(("server", lambda: _server(invited)))
        checks.append(("client's keys", lambda: parties.permissions(client, "client's keys")))
    health = Health([finding for check in checks for finding in _made(check)])
    if health.failed:
        raise NotReadyError(f"a run cannot start: {', '.join(health.failed)}", health)
    return health


def _made(check: Check) -> Iterator[Finding]:
    """The findings of a check; a check that cannot be made is a finding, too."""
    name, function = check
    try:
        result = function()
        yield from [result] if isinstance(result, Finding) else result
    except ImportError as error:
        yield failed(name, f"cannot be checked without {error.name}", "install the missing library")
    except (OSError, MPUError) as error:
        yield failed(name, f"cannot be checked: {error}", "resolve this and repeat the command")


def _plan(folder: Path) -> "tuple[RunPlan | None, Finding]":
    """The plan of a run, and whether it can be read."""
    try:
        from mpunlearn.server.plan import RunPlan

        for file in (folder / "plan.json", folder / "server" / "plan.json"):
            if file.is_file():
                plan = RunPlan.read(file)
                break
        else:
            raise PlanError(f"{folder}: contains no run (neither plan.json nor server/plan.json)")
        if not Path(plan.checkpoint).is_dir():
            return plan, failed("run", f"its model {plan.checkpoint} is missing", "restore the model at that path")
    except ImportError as error:
        return None, failed("run", f"its plan cannot be read without {error.name}", "install the missing library")
    except MPUError as error:
        return None, failed("run", str(error), "give the directory of a run")
    kind = "over a network" if plan.service is not None else "in one process"
    return plan, ok("run", f"{plan.rounds} rounds of {plan.training.objective}, {kind}")


def _isolation() -> Finding:
    from mpunlearn.protocol.flower import sandbox

    if number := sandbox.version():
        return ok("isolation", f"Landlock {number} confines Flower's programs")
    return warning(
        "isolation",
        "this system has no Landlock (Linux 5.13)",
        "run the server and the client on machines or in containers of their own",
    )


def _port(folder: Path | None, host: str, port: int, networked: bool) -> Finding:
    """Whether a server can listen, unless that of this run does already."""
    if folder is not None and networked:
        from mpunlearn.server.network.status import is_locked

        if is_locked(folder):
            return ok(f"port {port}", "in use by the server of this run, which is running")
    return parties.port(host, port)


def _server(path: Path) -> Iterator[Finding]:
    from mpunlearn.protocol.flower.keys import read_invitation

    try:
        invited = read_invitation(path)
    except PlanError as error:
        yield failed("server", str(error), "ask the server's owner for its invitation.json")
        return
    yield from parties.server(invited)
