"""Status."""

import time
from pathlib import Path
from typing import Any

from mpunlearn.errors import StateError
from mpunlearn.files import read_json


def status(run: str | Path, *, watch: bool = False) -> str:
    """Shows how far a run is.

    Args:
        run: the run's directory.
        watch: go on showing it until the run is complete.

    Returns:
        A few lines.

    Raises:
        StateError: there is no run.
    """
    run = Path(run)
    _plan(run)
    while watch and _status(run).get("phase") != "complete":
        print(f"\033[2J\033[H{describe_status(run)}", flush=True)
        time.sleep(1)
    return describe_status(run)


def describe_status(run: Path) -> str:
    """What `status` prints."""
    found = _status(run)
    if not found:
        return "not begun"
    begun = (run / "plan.json").stat().st_mtime
    clients = found["clients"]
    per_round = max(1, sum(client["of"] for client in clients.values()) or found["copies"] * found["expected_clients"])
    done = (found["round"] - 1) * per_round + sum(client["updates"] for client in clients.values())
    whole = found["rounds"] * per_round
    elapsed = found["at"] - begun if found["phase"] == "complete" else time.time() - begun
    left = "" if not done or found["phase"] == "complete" else f", about {elapsed * (whole - done) / done:.0f} s left"
    lines = [
        f"run {found['run'][:8]}: {found['phase']}, round {found['round']} of {found['rounds']}, {elapsed:.0f} s{left}"
    ]
    if found["phase"] == "complete":
        return "\n".join([*lines, str(run / "final")])
    lines += [f"copies: {found['copies']} of {found['copy_bytes'] / max(1, found['copies']) / 1e6:.1f} MB"]
    for client, entry in clients.items():
        state = (
            "dropped: " + entry["dropped"]
            if entry["dropped"]
            else "connected"
            if entry["connected"]
            else "not here yet"
        )
        lines.append(
            f"client {client[:16]}: {state}, {entry['updates']} of {entry['of']} updates, {entry['bytes'] / 1e6:.1f} MB"
        )
    lines += ["a client is expected"] * (found["expected_clients"] - len(clients))
    return "\n".join(lines)


def _status(run: Path) -> dict[str, Any]:
    return read_json(run / "status.json") if (run / "status.json").exists() else {}


def _plan(run: Path) -> dict[str, Any]:
    if not (run / "plan.json").is_file():
        raise StateError(f"{run}: holds no run; begin one with `mpunlearn server start`")
    return read_json(run / "plan.json")
