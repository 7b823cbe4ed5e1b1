"""What must be refused: damaged, forged, replayed and poisonous messages, to the server and to the client.

Every case starts from the same moment of a run, one job out to one client, and afterwards nothing of the server's state may
have changed: the secret state, the models, the accepted updates.
"""

import dataclasses
import hashlib
import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tests.network.federation import Net, tiny_world

from mpunlearn import Training
from mpunlearn.checkpoint import checkpoint_digest
from mpunlearn.errors import MessageError, PlanError
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.messages import Challenge, File, Hello, Job, Result, Sealed, seal


@dataclasses.dataclass
class Scene:
    """One job out to one client, whose honest update is known."""

    folder: Path
    build: Callable[[Path], Net]

    def net(self, folder: Path) -> Net:
        """The run from that moment on, in a folder of its own."""
        shutil.copytree(self.folder, folder)
        return self.build(folder)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    root = tmp_path_factory.mktemp("scene")
    files = tiny_world(root)

    def build(folder: Path) -> Net:
        training = Training(objective="simnpo", epochs=1, batch_size=4, learning_rate=1e-3)
        return Net(folder, root / "model", [files[0]], files[1], rounds=1, copies=2, training=training)

    net = build(root / "start")
    while not net.coordinator._out:
        net.coordinator.step()
        net.carry()
        for file in (net.spool(0) / "jobs").iterdir():
            if isinstance(Sealed.open(file.read_bytes()).message, Challenge):
                net.workers[0].step()
        net.carry()
    return Scene(root / "start", build)


def job_of(net: Net, copy: int = 1) -> tuple[str, Job]:
    """Name and content of the job for a copy."""
    net.coordinator.step()
    return next((name, out.job) for name, out in net.coordinator._out.items() if out.job.copy == copy)


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
    update = {name: 1e-4 * torch.randn(value.shape) for name, value in copy.items() if ".layers." in name}
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


def bomb() -> bytes:
    """A gigabyte of zeros, as a zip file of a megabyte."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("update", bytes(100_000_000))
    return packed.getvalue()


def first(update: dict[str, torch.Tensor]) -> str:
    return sorted(update)[0]


def giant() -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    return len(header).to_bytes(8, "little") + header


Case = Callable[[Net, dict[str, bytes]], bytes]
STRANGER = b"\7" * 32
TO_SERVER: dict[str, tuple[Case, str]] = {
    "nothing": (lambda net, files: b"", "not a sealed message"),
    "noise": (lambda net, files: b"\x80\x04" * 500, "not a sealed message"),
    "a pickle": (lambda net, files: pickle.dumps(files), "not a sealed message"),
    "a length that lies": (lambda net, files: b"MPU1" + b"\xff" * 4 + b"{}", "damaged"),
    "cut off": (lambda net, files: result(net, files)[:200], "damaged"),
    "no JSON": (lambda net, files: b"MPU1" + (2).to_bytes(4, "little") + b"no", "not JSON"),
    "deeply nested": (lambda net, files: b"MPU1" + (60_000).to_bytes(4, "little") + b"[" * 60_000, "not JSON"),
    "not an object": (lambda net, files: b"MPU1" + (2).to_bytes(4, "little") + b"[]", "expected a JSON object"),
    "no signature": (lambda net, files: b"MPU1" + (2).to_bytes(4, "little") + b"{}", "body, key and signature"),
    "a changed body": (
        lambda net, files: result(net, files).replace(b"simnpo", b"x").replace(b'\\"job\\"', b'\\"jab\\"'),
        "signature",
    ),
    "a stranger's": (lambda net, files: result(net, files, stranger()), "does not carry for"),
    "an unknown kind": (
        lambda net, files: edited(result(net, files), lambda body: body.update(kind="order"), net.identity(0)),
        "kind 'order'",
    ),
    "a job": (
        lambda net, files: seal(job_of(net)[1], net.identity(0), payloads(net)),
        "expected a result",
    ),
    "an unknown field": (
        lambda net, files: edited(result(net, files), lambda body: body.update(path="/etc"), net.identity(0)),
        "no field 'path'",
    ),
    "a wrong type": (
        lambda net, files: edited(result(net, files), lambda body: body.update(files={}), net.identity(0)),
        "expected list",
    ),
    "not a number": (
        lambda net, files: edited(result(net, files), lambda body: body.update(job=float("nan")), net.identity(0)),
        "not JSON",
    ),
    "of another run": (lambda net, files: result(net, files, run="0" * 32), "answers no job"),
    "of no job": (lambda net, files: result(net, files, job="0" * 64), "answers no job"),
    "files and a refusal": (lambda net, files: result(net, files, refusal="no"), "either files or a refusal"),
    "neither": (lambda net, files: result(net, {}), "either files or a refusal"),
    "a path upwards": (lambda net, files: result(net, {"../../state/secret.key": b"x" * 32}), "a file is called"),
    "an absolute path": (lambda net, files: result(net, {"/tmp/update.json": b"{}"}), "a file is called"),
    "a pickle by name": (lambda net, files: result(net, {"update.bin": pickle.dumps(1)}), "a file is called"),
    "the same name twice": (
        lambda net, files: edited(
            result(net, files), lambda body: body["files"].append(body["files"][0]), net.identity(0)
        ),
        "same name",
    ),
    "a negative size": (
        lambda net, files: edited(result(net, files), lambda body: body["files"][0].update(size=-1), net.identity(0)),
        "impossible",
    ),
    "a truncated file": (lambda net, files: result(net, files)[:-100], "carries"),
    "more than was announced": (lambda net, files: result(net, files) + b"more", "carries"),
    "another file than was signed": (lambda net, files: result(net, files)[:-4] + b"\0\0\0\1", "damaged or incomplete"),
    "a terabyte": (
        lambda net, files: edited(
            result(net, files), lambda body: body["files"][0].update(size=1 << 40, slot=0), net.identity(0)
        ),
        "announces more|carries",
    ),
    "a URL of its own": (
        lambda net, files: edited(
            result(net, {}, files=[File("update.json", 2, "0" * 64, url="http://169.254.169.254/")]),
            lambda body: None,
            net.identity(0),
        ),
        "not where the job said",
    ),
    "a slot that was not allotted": (
        lambda net, files: result(net, {}, files=[File("update.json", 2, "0" * 64, slot=3)]),
        "not where the job said",
    ),
    "a pickle as safetensors": (
        lambda net, files: result(net, {**files, "update.safetensors": pickle.dumps(files)}),
        "neither an update nor",
    ),
    "a zip bomb": (lambda net, files: result(net, {**files, "update.safetensors": bomb()}), "neither an update nor"),
    "half a safetensors file": (
        lambda net, files: result(net, {**files, "update.safetensors": files["update.safetensors"][:-40]}),
        "neither an update nor",
    ),
    "a tensor larger than its file": (
        lambda net, files: result(net, {**files, "update.safetensors": giant()}),
        "neither an update nor",
    ),
    "a list without end": (
        lambda net, files: result(
            net, {**files, "update.safetensors": (1 << 25).to_bytes(8, "little") + bytes(1 << 25)}
        ),
        "headers of|announces more",
    ),
    "a card of many megabytes": (
        lambda net, files: result(net, {**files, "update.json": b" " * 17_000_000}),
        "announces more|at most",
    ),
    "no tensors": (lambda net, files: result(net, tensors(files, dict.clear)), "holds no tensors"),
    "no card": (lambda net, files: result(net, {**files, "update.json": b"{}"}), "does not say which copy"),
    "another copy's card": (lambda net, files: result(net, card(files, copy=2)), "is of copy 2"),
    "another round's card": (lambda net, files: result(net, card(files, round=9)), "round 9"),
    "an index to elsewhere": (
        lambda net, files: result(
            net,
            {
                "update.json": files["update.json"],
                "update.safetensors.index.json": b'{"weight_map": {"x": "../copies/copy-1/model.safetensors"}}',
            },
        ),
        "expected a .safetensors file beside",
    ),
    "a wrong shape": (
        lambda net, files: result(net, tensors(files, lambda u: u.update({first(u): torch.zeros(3)}))),
        "shape",
    ),
    "a missing tensor": (lambda net, files: result(net, tensors(files, lambda u: u.pop(first(u)))), "is not there"),
    "an extra tensor": (
        lambda net, files: result(net, tensors(files, lambda u: u.update({"lm_head.extra": torch.zeros(3)}))),
        "which the model does not have",
    ),
    "a tensor that the plan does not train": (
        lambda net, files: result(net, tensors(files, lambda u: u.update({"model.norm.weight": torch.zeros(32)}))),
        "should not be there",
    ),
    "integers": (
        lambda net, files: result(net, tensors(files, lambda u: u.update({first(u): u[first(u)].long()}))),
        "expected floating point",
    ),
    "NaN": (
        lambda net, files: result(net, tensors(files, lambda u: u[first(u)].fill_(float("nan")))),
        "NaN or infinite",
    ),
    "infinity": (
        lambda net, files: result(net, tensors(files, lambda u: u[first(u)].fill_(float("inf")))),
        "NaN or infinite",
    ),
    "a huge norm": (lambda net, files: result(net, tensors(files, lambda u: u[first(u)].fill_(1e6))), "norm is"),
    "a factor without its partner": (
        lambda net, files: result(net, tensors(files, lambda u: u.update({first(u) + ".lora_A": torch.zeros(2, 32)}))),
        "no matrix|without",
    ),
    "half a character": (
        lambda net, files: edited(result(net, files), lambda body: body.update(run="\ud800"), net.identity(0)),
        "not JSON",
    ),
    "half a character in a file": (lambda net, files: result(net, card(files, run="\ud800")), "JSON"),
    "half a character as the key": (
        lambda net, files: edited(result(net, files), lambda body: None, half()),
        "not JSON",
    ),
    "a number without end": (
        lambda net, files: edited(
            result(net, files), lambda body: body["files"][0].update(size=10**400), net.identity(0)
        ),
        "not JSON|up to",
    ),
    "factors where the plan trains weights": (
        lambda net, files: result(net, tensors(files, factorise)),
        "the plan says otherwise",
    ),
    "an answer to no challenge": (
        lambda net, files: seal(Hello(job_of(net)[1].run, "0" * 32, "1"), stranger()),
        "another challenge",
    ),
}


def half() -> Any:
    """Signs with a key that is half a character."""
    return SimpleNamespace(public="\ud800", sign=lambda text: "00" * 64)


def factorise(update: dict[str, torch.Tensor]) -> None:
    """Every matrix as factors that would overflow in another basis, everything else as it is."""
    for name in [name for name in update if update[name].dim() == 2]:
        outputs, inputs = update.pop(name).shape
        update[f"{name}.lora_A"], update[f"{name}.lora_B"] = (
            torch.full((1, inputs), 3e38),
            torch.full((outputs, 1), 1e-45),
        )


def stranger() -> Identity:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Identity(Ed25519PrivateKey.from_private_bytes(STRANGER))


def payloads(net: Net) -> list[Path]:
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    return [folder / file.name for file in job_of(net)[1].files]


@pytest.mark.parametrize("case", TO_SERVER)
def test_the_server_refuses(case: str, scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    files = honest(net, tmp_path / "honest")
    make, why = TO_SERVER[case]
    data = make(net, files)
    before, said = secrets_of(net), len(net.said)
    name = job_of(net)[0]
    (net.coordinator.mail / "inbox" / f"1-{name}").write_bytes(data)
    assert not net.coordinator.step()
    refused = [line for line in net.said[said:] if line.startswith("refused")]
    assert len(refused) == 1
    assert re.search(why, refused[0]), refused[0]
    assert secrets_of(net) == before
    assert not list((net.folder / "server/mail/inbox").iterdir())
    # The run goes on: the same job, or the next attempt at it, takes the honest answer.
    name = job_of(net)[0]
    (net.coordinator.mail / "inbox" / f"1-{name}").write_bytes(result(net, files))
    net.coordinator.step()
    assert "update of copy 1 of 2" in net.said[-1]


def test_an_answer_counts_once_and_only_from_its_client(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    files = honest(net, tmp_path / "honest")
    name = job_of(net)[0]
    data = result(net, files)
    for node, expected in (("2", "does not carry for"), ("1", "update of copy 1"), ("1", "answers no job")):
        (net.coordinator.mail / "inbox" / f"{node}-{name}").write_bytes(data)
        net.coordinator.step()
        assert expected in net.said[-1]


def test_a_run_with_a_poisoned_answer_ends_like_one_without(scene: Scene, tmp_path: Path) -> None:
    finals = []
    for number in range(2):
        net = scene.net(tmp_path / str(number))
        spoiled: list[str] = []

        def tamper(node: str, name: str, data: bytes, spoiled: list[str] = spoiled) -> bytes:
            if spoiled or len(data) < 1000:
                return data
            spoiled.append(name)
            return data[:-4] + b"\0\0\0\1"

        net.tamper = tamper if number else None
        finals.append(checkpoint_digest(net.run()))
        assert len(spoiled) == number
        assert any(line.startswith("refused") for line in net.said) == bool(number)
    assert finals[0] == finals[1]


def test_a_client_that_never_sends_an_update_that_passes_is_named(scene: Scene, tmp_path: Path) -> None:
    from mpunlearn.errors import NetworkError

    net = scene.net(tmp_path / "net")
    files = tensors(honest(net, tmp_path / "honest"), lambda u: u[first(u)].fill_(float("nan")))
    with pytest.raises(NetworkError, match=f"client {net.identity(0).public[:16]} sent 3 results"):
        for _ in range(3):
            name = job_of(net)[0]
            (net.coordinator.mail / "inbox" / f"1-{name}").write_bytes(result(net, files))
            net.coordinator.step()


# The client's side.


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


UNREADABLE: dict[str, tuple[Callable[[Net], bytes], str]] = {
    "a stranger's job": (lambda net: job_with(net, stranger()), "signed by"),
    "a path upwards": (lambda net: job_with(net, files=[File("../x.safetensors", 0, "0" * 64)]), "a file is called"),
    "a pickle by name": (lambda net: job_with(net, files=[File("pytorch_model.bin", 0, "0" * 64)]), "a file is called"),
    "code": (lambda net: job_with(net, files=[File("modeling.py", 0, "0" * 64)]), "a file is called"),
    "impossible numbers": (lambda net: job_with(net, copy=3), "impossible numbers"),
    "a result": (lambda net: seal(Result("0" * 32, "0" * 64, refusal="x"), net.coordinator.identity), "expected a job"),
    "noise": (lambda net: b"noise", "not a sealed message"),
    "half a character": (lambda net: edited(job_with(net), lambda body: None, half()), "not JSON"),
    "rounds without end": (
        lambda net: edited(job_with(net), lambda body: body.update(rounds=1 << 60), net.coordinator.identity),
        "up to",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_the_client_does_not_look_at(case: str, scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    make, why = UNREADABLE[case]
    path = hand_over(net, make(net))
    assert why in net.said[-1]
    assert not (net.spool(0) / "results" / path.name).exists()
    net.workers[0].step()
    assert sum(why in line for line in net.said) == 1  # said once


TRAINING = Training(objective="simnpo", epochs=1, batch_size=4, learning_rate=1e-3).plain()
AGAINST_POLICY: dict[str, tuple[dict[str, Any], str]] = {
    "for another client": ({"client": "0" * 64}, "another client"),
    "too many copies": ({"copies": 9}, "max copies is 8"),
    "too many rounds": ({"rounds": 21}, "max rounds is 20"),
    "too many epochs": ({"training": {**TRAINING, "epochs": 21}}, "max epochs is 20"),
    "an objective": ({"training": {**TRAINING, "objective": "grad-ascent"}}, "objectives are simnpo"),
    "the embeddings": ({"training": {**TRAINING, "train": "all"}}, "train is blocks"),
    "no plan": ({"training": {"shell": "rm"}}, "its training plan is none"),
    "a plan of wrong types": ({"training": {**TRAINING, "epochs": "many"}}, "its training plan is none"),
    "a plan with a list of parameters": ({"training": {**TRAINING, "parameters": [1]}}, "its training plan is none"),
    "a plan with a text as parameter": (
        {"training": {**TRAINING, "parameters": {"beta": "x"}}},
        "its training plan is none",
    ),
    "half an epoch": ({"training": {**TRAINING, "epochs": 1.5}}, "its training plan is none"),
    "a list of objectives": ({"training": {**TRAINING, "objective": ["simnpo"]}}, "its training plan is none"),
    "a rate without end": ({"training": {**TRAINING, "learning_rate": 10**400}}, "its training plan is none"),
    "a seed that no generator takes": ({"training": {**TRAINING, "seed": 1 << 40}}, "its training plan is none"),
    "a store": (
        {"slots": ["https://elsewhere.example/x?signature=1"]},
        "stores do not include https://elsewhere.example/x",
    ),
    "files of this machine": ({"slots": ["file:///root/.bashrc"]}, "stores do not include"),
    "out of an allowed store": ({"slots": ["file:///shared/mpu/../../root/.bashrc"]}, "stores do not include"),
    "out of an allowed store, encoded": (
        {"slots": ["https://store.example/mpu/%2E%2e/%2e%2e/private"]},
        "stores do not include",
    ),
    "beside an allowed store": ({"slots": ["file:///shared/mpu-other/x"]}, "stores do not include"),
    "a size": ({"files": [File("model.safetensors", 10**12, "0" * 64, url="file:///shared/mpu/x")]}, "max megabytes"),
}


@pytest.mark.parametrize("case", AGAINST_POLICY)
def test_the_policy_refuses(case: str, scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    net.policy = {"objectives": ["simnpo"], "stores": ["file:///shared/mpu", "https://store.example/mpu"]}
    net.workers = [net.start_worker(0)]
    changes, why = AGAINST_POLICY[case]
    path = hand_over(net, job_with(net, **changes))
    refusal = answer(net, path).refusal
    assert refusal is not None
    assert why in refusal
    assert "signature" not in refusal
    assert not (net.folder / "work-0" / "updates").exists()


def test_one_copy_under_one_number_and_one_run(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    path = hand_over(net, job_with(net))
    assert answer(net, path).refusal is None
    again = hand_over(net, job_with(net, nonce="again"))
    assert answer(net, again).files == answer(net, path).files  # the same update, not trained again
    _, other = job_of(net, copy=2)
    folder = net.folder / "server/exchange/round-1/copies/copy-2"
    files = [folder / file.name for file in other.files]
    swapped = unchecked(Job, **{**vars(other), "copy": 1})
    second = hand_over(net, seal(swapped, net.coordinator.identity, files))
    assert "was another copy or another plan before" in str(answer(net, second).refusal)
    for change in ({"rounds": 2}, {"copies": 3}, {"training": {**TRAINING, "epochs": 2}}):
        changed = hand_over(net, job_with(net, **change))
        assert answer(net, changed).refusal == "the plan is another than in the first job of this run"
    elsewhere = hand_over(net, job_with(net, run="0" * 32))
    assert answer(net, elsewhere).refusal == (
        "this client takes part in another run; for this one it needs another --work"
    )


def test_a_copy_that_is_not_what_the_server_signed_is_not_trained_on(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    data = job_with(net)
    path = hand_over(net, data[:-1] + bytes([data[-1] ^ 1]))
    assert "damaged or incomplete" in net.said[-1]
    assert not (net.spool(0) / "results" / path.name).exists()
    assert not (net.folder / "work-0" / "updates").exists()
    assert not list((net.folder / "work-0" / "copies").glob("*"))


def test_a_link_in_the_spool_is_not_followed(scene: Scene, tmp_path: Path) -> None:
    from mpunlearn.errors import StateError

    net = scene.net(tmp_path / "net")
    data = job_with(net)
    (tmp_path / "job").write_bytes(data)
    name = hashlib.sha256(data).hexdigest()
    for old in (net.spool(0) / "jobs").iterdir():
        old.unlink()
    (net.spool(0) / "jobs" / name).symlink_to(tmp_path / "job")
    net.workers[0].step()
    assert net.said[-1].startswith("refused")
    another = job_with(net, nonce="another")
    shutil.rmtree(net.spool(0) / "results")
    (net.spool(0) / "results").symlink_to(tmp_path)
    with pytest.raises(StateError, match="tampers"):
        hand_over(net, another)


def test_what_else_stands_in_the_spool_stops_nothing(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    data = job_with(net)
    name = hashlib.sha256(data).hexdigest()
    (net.spool(0) / "results" / f".{name}.partial").mkdir()
    (net.spool(0) / "jobs" / ("f" * 64)).mkdir()
    (net.spool(0) / "jobs" / "notes.txt").write_text("x")
    path = net.spool(0) / "jobs" / name
    path.write_bytes(data)
    net.workers[0].step()
    assert answer(net, path).refusal is None
    shutil.rmtree(net.spool(0) / "results")
    net.workers[0].step()
    assert answer(net, path).refusal is None  # made anew


def test_a_copy_whose_config_makes_no_sense_is_refused(scene: Scene, tmp_path: Path) -> None:
    for number, change in enumerate(
        ({"num_attention_heads": "x"}, {"hidden_size": 10**9}, {"model_type": "x"}, {"rms_norm_eps": "x"})
    ):
        net = scene.net(tmp_path / str(number))
        folder = net.folder / "server/exchange/round-1/copies/copy-1"
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        assert "copy" in str(answer(net, given(net, folder)).refusal), change
        assert not (net.folder / "work-0" / "updates" / "round-1-copy-1").exists()


def given(net: Net, folder: Path) -> Path:
    """Hands over copy 1 as it lies in a folder now."""
    _, job = job_of(net)
    files = [folder / file.name for file in job.files]
    listed = [File(file.name, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return hand_over(net, seal(unchecked(Job, **{**vars(job), "files": listed}), net.coordinator.identity, files))


@pytest.mark.parametrize(
    "change", [{"_attn_implementation": "somebody/kernel"}, {"attn_implementation": {"": "somebody/kernel"}}]
)
def test_a_copy_that_names_code_of_the_hub_is_not_loaded(change, scene: Scene, tmp_path: Path, monkeypatch) -> None:
    import transformers

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    net = scene.net(tmp_path / "net")
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert answer(net, given(net, folder)).refusal == "transformers cannot load the copy"
    assert any("names code of others" in line for line in net.said)


def test_a_training_that_breaks_is_a_refusal(scene: Scene, tmp_path: Path) -> None:
    """The copy's tokenizer gives ids that its model does not have."""
    net = scene.net(tmp_path / "net")
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 3}))
    found = load_file(folder / "model.safetensors")
    cut = {key: value[:3] if value.shape[0] == config["vocab_size"] else value for key, value in found.items()}
    save_file({key: value.contiguous() for key, value in cut.items()}, folder / "model.safetensors")
    assert answer(net, given(net, folder)).refusal == "training on the copy failed"
    assert "Traceback" in (net.folder / "work-0" / "error.txt").read_text()
    assert not (net.folder / "work-0" / "updates" / "round-1-copy-1").exists()


def test_an_old_job_is_not_done_again(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    data = job_with(net, rounds=5)
    assert answer(net, hand_over(net, data)).refusal is None
    kept = net.folder / "work-0" / "copies.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "round-4-copy-1": {}}))
    current = net.folder / "work-0" / "updates" / "round-4-copy-1"
    current.mkdir()
    old = hand_over(net, job_with(net, rounds=5, nonce="again"))
    assert "round 1 is over" in str(answer(net, old).refusal)
    assert current.exists()


def test_a_refusal_cannot_move_the_cursor(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    name = job_of(net)[0]
    (net.coordinator.mail / "inbox" / f"1-{name}").write_bytes(result(net, {}, refusal="\x1b[2Jrun complete"))
    from mpunlearn.errors import NetworkError

    with pytest.raises(NetworkError, match=r"x1b\[2Jrun complete") as caught:
        net.coordinator.step()
    assert "\x1b" not in str(caught.value)


def test_a_result_that_is_always_damaged_is_not_asked_for_for_ever(scene: Scene, tmp_path: Path) -> None:
    from mpunlearn.errors import NetworkError

    net = scene.net(tmp_path / "net")
    net.tamper = lambda node, name, data: data[:-4] + b"\0\0\0\1" if len(data) > 1000 else data
    with pytest.raises(NetworkError, match="sent 3 results"):
        net.run()
    net = scene.net(tmp_path / "noise")
    net.tamper = lambda node, name, data: b"noise"
    with pytest.raises(NetworkError, match="sent 3 results"):
        net.run()


def test_a_refusal_says_nothing_of_the_text(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    path = hand_over(net, job_with(net, training={**TRAINING, "skip_tokens": 10_000}))
    assert answer(net, path).refusal == "the plan cannot be followed with this client's text"


def test_a_message_for_one_kind_is_no_other(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    data = result(net, honest(net, tmp_path / "honest"))
    with pytest.raises(MessageError, match="signed by"):
        Sealed.open(data, net.coordinator.identity.public)
    with pytest.raises(PlanError, match="server_key"):
        net.policy = {}
        type(net.workers[0]._policy)("not a key")
