"""The demonstration over a network: the two commands of the README in two processes, and what came of it.

Both parties run on this machine and speak over Flower on the loopback address; the server's folder and the client's have
nothing in common but the address. Without TLS, since nobody else can reach that address; docs/network.md says how it is done
in earnest.
"""

import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpunlearn.demo import models
from mpunlearn.demo.example import example
from mpunlearn.demo.table import measure, table
from mpunlearn.errors import CheckpointError, NetworkError
from mpunlearn.protocol.flower.programs import free_port

OPTIONS = (
    "--rounds 5 --copies 3 --kappa 0.05 --objective npo --epochs 2 --learning-rate 1e-3 --batch-size 8 --gamma 0.1"
)
PATIENCE = 600.0
"""Seconds after which the demonstration gives up."""


def network_demo(*, out: str | Path = "mpu-network-demo", seed: int = 0) -> dict[str, Any]:
    """Unlearns between two processes over Flower on this machine, and compares.

    Args:
        out: a new directory for both parties' folders.
        seed: of the world and the models.

    Returns:
        Seconds, and where the model is.

    Raises:
        CheckpointError: `out` exists or cannot be written.
        NetworkError: a process failed, or took too long.
    """
    out, begin = Path(out), time.monotonic()
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name another --out, or remove this one")
    world = models.prepare(seed)
    example(out, seed=seed)
    port = str(free_port())
    server = ["server", "start", "model", "--run", "server", "--insecure", "true", "--port", port, *OPTIONS.split()]
    client = ["client", "join", "server/invitation.json", "--work", "client"]
    client += ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    started = time.monotonic()
    programs = [_start(out, "server", server)]
    try:
        _until(lambda: (out / "server" / "invitation.json").exists(), programs)
        programs.append(_start(out, "client", client))
        _until(lambda: all(program.poll() is not None for program in programs), programs)
    finally:
        for program in programs:
            if program.poll() is None:
                program.terminate()
                with suppress(subprocess.TimeoutExpired):
                    program.wait(20)
    seconds = time.monotonic() - started
    lines = [measure("original", world.original, world), measure("retrained", world.retrained, world)]
    lines.append(measure("MPU over a network, 3 copies", out / "server" / "final", world, seconds))
    print(table(lines))
    print(f"{time.monotonic() - begin:.0f} s in all. The parties' folders: {out}/server, {out}/client")
    return {"seconds": seconds, "final": str(out / "server" / "final")}


def _start(folder: Path, name: str, arguments: list[str]) -> subprocess.Popen[str]:
    """Starts one party; its lines appear behind its name."""
    print(f"{name}$ mpunlearn {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "mpunlearn.cli", *arguments]
    program = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def show() -> None:
        for line in program.stdout or ():
            print(f"{name:>6} | {line}", end="", flush=True)

    threading.Thread(target=show, daemon=True).start()
    return program


def _until(done: Any, programs: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        if any(program.poll() for program in programs):
            raise NetworkError("one of the parties failed; its last lines say why")
        if time.monotonic() > end:
            raise NetworkError(f"not done after {PATIENCE:g} s")
        time.sleep(0.1)
