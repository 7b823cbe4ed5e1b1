"""Forged, edited and honest messages at one moment of a run: one job out to one client."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from tests.network.federation import Net

from mpunlearn import Training
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.messages import File, Job, Result, Sealed, seal
from mpunlearn.protocol.record.artifacts import EVENT_FILE

TRAINING = Training(objective="simnpo", epochs=1, batch_size=4, learning_rate=1e-3).to_json()
"""The plan of the scene's run."""


@dataclasses.dataclass
class Scene:
    """One job out to one client, whose honest update is known."""

    folder: Path
    build: Callable[[Path], Net]

    def net(self, folder: Path) -> Net:
        """The run from that moment on, in a folder of its own."""
        shutil.copytree(self.folder, folder)
        return self.build(folder)


def job_of(net: Net, copy: int = 1) -> tuple[str, Job]:
    """Name and content of the job for a copy."""
    net.coordinator.step()
    return next((name, out.job) for name, out in net.coordinator.jobs.open.items() if out.job.copy == copy)


def secrets_of(net: Net) -> dict[str, str]:
    """Digests of all that no message may change."""
    server = net.folder / "server"
    kept = [server / "state", server / "plan.json", server / "identity.key", server / "clients.json", server / "final"]
    kept += [server / "exchange" / "round-1" / name for name in ("copies", "updates", "files.json")]
    files = [file for path in kept for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(server)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def honest(net: Net, folder: Path) -> dict[str, bytes]:
    """The files of an honest update of copy 1."""
    folder.mkdir()
    copy = load_file(net.folder / "server/exchange/round-1/copies/copy-1/model.safetensors")
    torch.manual_seed(0)
    read_embedding = {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"}
    trained = {name for name in copy if ".layers." in name} - read_embedding
    update = {name: 1e-4 * torch.randn(copy[name].shape) for name in sorted(trained)}
    save_file(update, folder / "update.safetensors")
    _, job = job_of(net)
    card = {"run": job.run, "round": 1, "copy": 1, "copies": 2}
    (folder / "update.json").write_text(json.dumps({"format": 1, "mpunlearn": card}))
    return {name: (folder / name).read_bytes() for name in ("update.json", "update.safetensors")}


def result(net: Net, given: dict[str, bytes], identity: Identity | None = None, **changes: Any) -> bytes:
    """A signed result with those files in it."""
    name, job = job_of(net)
    listed = [File(file, len(data), hashlib.sha256(data).hexdigest()) for file, data in given.items()]
    message = unchecked(Result, **{"run": job.run, "job": name, "files": listed, **changes})
    sealed = seal(message, identity or net.identity(0))
    return sealed + b"".join(given.values())


def unchecked(kind: type, /, **fields: Any) -> Any:
    """A message that its own constructor would refuse."""
    message = object.__new__(kind)
    defaults = {f.name: f.default if f.default is not dataclasses.MISSING else [] for f in dataclasses.fields(kind)}
    for name, value in {**defaults, **fields}.items():
        object.__setattr__(message, name, value)
    return message


def edited(data: bytes, change: Callable[[dict], None], identity: Identity) -> bytes:
    """A message whose body was changed, and signed again."""
    length = int.from_bytes(data[4:8], "little")
    body = json.loads(json.loads(data[8 : 8 + length])["body"])
    change(body)
    text = json.dumps(body)
    header = json.dumps({"body": text, "key": identity.public, "signature": identity.sign(text)}).encode()
    return data[:4] + len(header).to_bytes(4, "little") + header + data[8 + length :]


def tensors(files: dict[str, bytes], change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, bytes]:
    """The files with other tensors."""
    from safetensors.torch import load

    found = load(files["update.safetensors"])
    change(found)
    return {**files, "update.safetensors": save(found)}


def card(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    """The files with another card."""
    entry = json.loads(files["update.json"])
    entry["mpunlearn"] |= changes
    return {**files, "update.json": json.dumps(entry).encode()}


def half() -> Any:
    """Signs with a key that is half a character."""
    return SimpleNamespace(public="\ud800", sign=lambda text: "00" * 64)


def stranger() -> Identity:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Identity(Ed25519PrivateKey.from_private_bytes(STRANGER))


def payloads(net: Net) -> list[Path]:
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    return [folder / file.name for file in job_of(net)[1].files]


STRANGER = b"\7" * 32


def first(update: dict[str, torch.Tensor]) -> str:
    return sorted(update)[0]


def hand_over(net: Net, data: bytes, name: str | None = None) -> Path:
    """Puts a message into the spool, and lets the worker look."""
    for old in (net.spool(0) / "jobs").iterdir():
        old.unlink()
    path = net.spool(0) / "jobs" / (name or hashlib.sha256(data).hexdigest())
    path.write_bytes(data)
    net.workers[0].step()
    return path


def answer(net: Net, path: Path) -> Result:
    found: Result = Sealed.open((net.spool(0) / "results" / path.name).read_bytes()).message
    return found


def job_with(net: Net, identity: Identity | None = None, **changes: Any) -> bytes:
    message = unchecked(Job, **{**vars(job_of(net)[1]), **changes})
    return seal(message, identity or net.coordinator.identity, payloads(net) if "files" not in changes else [])


def given(net: Net, folder: Path, event: bool = False) -> Path:
    """Hands over copy 1 as it lies in a folder now, with or without the event that says how it was."""
    _, job = job_of(net)
    files = [folder / file.name for file in job.files if event or file.name != EVENT_FILE]
    listed = [File(file.name, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return hand_over(net, seal(unchecked(Job, **{**vars(job), "files": listed}), net.coordinator.identity, files))
