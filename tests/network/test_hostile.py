"""Damaged, forged, replayed and poisonous answers of a client, and what they must not change.

Every case starts from the same moment of a run, one job out to one client. Afterwards nothing of the server's state may
have changed: the secret state, the models, the accepted updates.
"""

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.network.federation import Net
from tests.network.forgery import (
    Scene,
    card,
    edited,
    first,
    half,
    honest,
    job_of,
    payloads,
    result,
    secrets_of,
    stranger,
    tensors,
)

from mpunlearn.checkpoint import checkpoint_digest
from mpunlearn.protocol.messages import File, Hello, seal


def bomb() -> bytes:
    """A gigabyte of zeros, as a zip file of a megabyte."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("update", bytes(100_000_000))
    return packed.getvalue()


def giant() -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    return len(header).to_bytes(8, "little") + header


Case = Callable[[Net, dict[str, bytes]], bytes]


TO_SERVER: dict[str, tuple[Case, str]] = {
    "nothing": (lambda net, files: b"", "not a sealed message"),
    "noise": (lambda net, files: b"\x80\x04" * 500, "not a sealed message"),
    "a pickle": (lambda net, files: pickle.dumps(files), "not a sealed message"),
    "a length that lies": (lambda net, files: b"MPU1" + b"\xff" * 4 + b"{}", "damaged"),
    "cut off": (lambda net, files: result(net, files)[:200], "damaged"),
    "no JSON": (lambda net, files: b"MPU1" + (2).to_bytes(4, "little") + b"no", "not valid JSON"),
    "deeply nested": (lambda net, files: b"MPU1" + (60_000).to_bytes(4, "little") + b"[" * 60_000, "not valid JSON"),
    "not an object": (lambda net, files: b"MPU1" + (2).to_bytes(4, "little") + b"[]", "expected a JSON object"),
    "no signature": (lambda net, files: b"MPU1" + (2).to_bytes(4, "little") + b"{}", "body, key and signature"),
    "a changed body": (
        lambda net, files: result(net, files).replace(b"simnpo", b"x").replace(b'\\"job\\"', b'\\"jab\\"'),
        "signature",
    ),
    "a stranger's": (lambda net, files: result(net, files, stranger()), "does not relay messages for"),
    "an unknown kind": (
        lambda net, files: edited(result(net, files), lambda body: body.update(kind="order"), net.identity(0)),
        "unknown kind of message 'order'",
    ),
    "a job": (
        lambda net, files: seal(job_of(net)[1], net.identity(0), payloads(net)),
        "expected a result",
    ),
    "an unknown field": (
        lambda net, files: edited(result(net, files), lambda body: body.update(path="/etc"), net.identity(0)),
        "unknown field 'path'",
    ),
    "a wrong type": (
        lambda net, files: edited(result(net, files), lambda body: body.update(files={}), net.identity(0)),
        "expected list",
    ),
    "not a number": (
        lambda net, files: edited(result(net, files), lambda body: body.update(job=float("nan")), net.identity(0)),
        "not valid JSON",
    ),
    "of another run": (lambda net, files: result(net, files, run="0" * 32), "does not answer any open job"),
    "of no job": (lambda net, files: result(net, files, job="0" * 64), "does not answer any open job"),
    "files and a refusal": (lambda net, files: result(net, files, refusal="no"), "either files or a refusal"),
    "neither": (lambda net, files: result(net, {}), "either files or a refusal"),
    "a path upwards": (lambda net, files: result(net, {"../../state/secret.key": b"x" * 32}), "unexpected file name"),
    "an absolute path": (lambda net, files: result(net, {"/tmp/update.json": b"{}"}), "unexpected file name"),
    "a pickle by name": (lambda net, files: result(net, {"update.bin": pickle.dumps(1)}), "unexpected file name"),
    "the same name twice": (
        lambda net, files: edited(
            result(net, files), lambda body: body["files"].append(body["files"][0]), net.identity(0)
        ),
        "same name",
    ),
    "a negative size": (
        lambda net, files: edited(result(net, files), lambda body: body["files"][0].update(size=-1), net.identity(0)),
        "invalid size",
    ),
    "a truncated file": (lambda net, files: result(net, files)[:-100], "contains files of"),
    "more than was announced": (lambda net, files: result(net, files) + b"more", "contains files of"),
    "another file than was signed": (lambda net, files: result(net, files)[:-4] + b"\0\0\0\1", "damaged or incomplete"),
    "a terabyte": (
        lambda net, files: edited(
            result(net, files), lambda body: body["files"][0].update(size=1 << 40, slot=0), net.identity(0)
        ),
        "announces more|contains files of",
    ),
    "a URL of its own": (
        lambda net, files: edited(
            result(net, {}, files=[File("update.json", 2, "0" * 64, url="http://169.254.169.254/")]),
            lambda body: None,
            net.identity(0),
        ),
        "not at the location that the job specified",
    ),
    "a slot that was not allotted": (
        lambda net, files: result(net, {}, files=[File("update.json", 2, "0" * 64, slot=3)]),
        "not at the location that the job specified",
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
    "no tensors": (lambda net, files: result(net, tensors(files, dict.clear)), "contains no tensors"),
    "no card": (lambda net, files: result(net, {**files, "update.json": b"{}"}), "does not say which copy"),
    "another copy's card": (lambda net, files: result(net, card(files, copy=2)), "belongs to copy 2"),
    "another round's card": (lambda net, files: result(net, card(files, round=9)), "round 9"),
    "twenty thousand empty shards": (
        lambda net, files: result(net, files | {f"update-{n:05d}-of-20000.safetensors": b"" for n in range(1, 20_001)}),
        "lists 20002 files",
    ),
    "a shard beside the whole": (
        lambda net, files: result(net, files | {"update-00001-of-00001.safetensors": files["update.safetensors"]}),
        "lists 3 files",
    ),
    "an index to elsewhere": (
        lambda net, files: result(
            net,
            {
                "update.json": files["update.json"],
                "update-00001-of-00001.safetensors": files["update.safetensors"],
                "update.safetensors.index.json": b'{"weight_map": {"x": "../copies/copy-1/model.safetensors"}}',
            },
        ),
        "expected a .safetensors file in the same directory",
    ),
    "a wrong shape": (
        lambda net, files: result(net, tensors(files, lambda u: u.update({first(u): torch.zeros(3)}))),
        "shape",
    ),
    "a missing tensor": (lambda net, files: result(net, tensors(files, lambda u: u.pop(first(u)))), "missing one is"),
    "an extra tensor": (
        lambda net, files: result(net, tensors(files, lambda u: u.update({"lm_head.extra": torch.zeros(3)}))),
        "which the model does not have",
    ),
    "a tensor that the plan does not train": (
        lambda net, files: result(net, tensors(files, lambda u: u.update({"model.norm.weight": torch.zeros(32)}))),
        "unexpected one is",
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
        "not valid JSON",
    ),
    "half a character in a file": (lambda net, files: result(net, card(files, run="\ud800")), "JSON"),
    "half a character as the key": (
        lambda net, files: edited(result(net, files), lambda body: None, half()),
        "not valid JSON",
    ),
    "a number without end": (
        lambda net, files: edited(
            result(net, files), lambda body: body["files"][0].update(size=10**400), net.identity(0)
        ),
        "not valid JSON|at most",
    ),
    "factors where the plan trains weights": (
        lambda net, files: result(net, tensors(files, factorize)),
        "contrary to the plan",
    ),
    "an answer to no challenge": (
        lambda net, files: seal(Hello(job_of(net)[1].run, "0" * 32, "1"), stranger()),
        "a different challenge",
    ),
}


def factorize(update: dict[str, torch.Tensor]) -> None:
    """Every matrix as factors that would overflow in another basis, everything else as it is."""
    for name in [name for name in update if update[name].dim() == 2]:
        outputs, inputs = update.pop(name).shape
        update[f"{name}.lora_A"], update[f"{name}.lora_B"] = (
            torch.full((1, inputs), 3e38),
            torch.full((outputs, 1), 1e-45),
        )


@pytest.mark.parametrize("case", TO_SERVER)
def test_the_server_refuses(case: str, scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    files = honest(net, tmp_path / "honest")
    make, why = TO_SERVER[case]
    data = make(net, files)
    before, said = secrets_of(net), len(net.said)
    name = job_of(net)[0]
    (net.coordinator.folder.mail / "inbox" / f"1-{name}").write_bytes(data)
    assert not net.coordinator.step()
    refused = [line for line in net.said[said:] if line.startswith("rejected")]
    assert len(refused) == 1
    assert re.search(why, refused[0]), refused[0]
    assert secrets_of(net) == before
    assert not list((net.folder / "server/mail/inbox").iterdir())
    # The run goes on: the same job, or the next attempt at it, takes the honest answer.
    name = job_of(net)[0]
    (net.coordinator.folder.mail / "inbox" / f"1-{name}").write_bytes(result(net, files))
    net.coordinator.step()
    assert "update of copy 1 of 2" in net.said[-1]


def test_an_answer_counts_once_and_only_from_its_client(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    files = honest(net, tmp_path / "honest")
    name = job_of(net)[0]
    data = result(net, files)
    for node, expected in (
        ("2", "does not relay messages for"),
        ("1", "update of copy 1"),
        ("1", "does not answer any open job"),
    ):
        (net.coordinator.folder.mail / "inbox" / f"{node}-{name}").write_bytes(data)
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
        assert any(line.startswith("rejected") for line in net.said) == bool(number)
    assert finals[0] == finals[1]


def test_a_client_that_never_sends_an_update_that_passes_is_named(scene: Scene, tmp_path: Path) -> None:
    from mpunlearn.errors import NetworkError

    net = scene.net(tmp_path / "net")
    files = tensors(honest(net, tmp_path / "honest"), lambda u: u[first(u)].fill_(float("nan")))
    with pytest.raises(NetworkError, match=f"client {net.identity(0).public[:16]} sent 3 results"):
        for _ in range(3):
            name = job_of(net)[0]
            (net.coordinator.folder.mail / "inbox" / f"1-{name}").write_bytes(result(net, files))
            net.coordinator.step()


def test_a_refusal_cannot_move_the_cursor(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    name = job_of(net)[0]
    (net.coordinator.folder.mail / "inbox" / f"1-{name}").write_bytes(result(net, {}, refusal="\x1b[2Jrun complete"))
    from mpunlearn.errors import NetworkError

    with pytest.raises(NetworkError, match=r"x1b\[2Jrun complete") as caught:
        net.coordinator.step()
    assert "\x1b" not in str(caught.value)


def test_a_result_that_is_always_damaged_is_not_asked_for_forever(scene: Scene, tmp_path: Path) -> None:
    from mpunlearn.errors import NetworkError

    net = scene.net(tmp_path / "net")
    net.tamper = lambda node, name, data: data[:-4] + b"\0\0\0\1" if len(data) > 1000 else data
    with pytest.raises(NetworkError, match="sent 3 results"):
        net.run()
    net = scene.net(tmp_path / "noise")
    net.tamper = lambda node, name, data: b"noise"
    with pytest.raises(NetworkError, match="sent 3 results"):
        net.run()


def test_an_answer_that_ends_the_server_is_not_examined_forever(scene: Scene, tmp_path: Path) -> None:
    """The server really ends, in a process of its own, each time it examines the answer; the client is asked again."""
    from mpunlearn.server.network import results

    net = scene.net(tmp_path / "net")
    data, name = result(net, honest(net, tmp_path / "honest")), job_of(net)[0]
    codes = []
    for _ in range(3):
        (net.coordinator.folder.mail / "inbox" / f"1-{name}").write_bytes(data)  # the courier brings it again
        if (child := os.fork()) == 0:
            results.examine = lambda *_, **__: os._exit(9)  # type: ignore[assignment]
            net.start_server()
            net.coordinator.step()
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert codes == [9, 9, 0]
    net.start_server()
    net.coordinator.step()
    again = [entry.job for entry in net.coordinator.jobs.open.values() if entry.job.copy == 1]
    assert [job.attempt for job in again] == [2]
    assert name not in net.coordinator.jobs.open
