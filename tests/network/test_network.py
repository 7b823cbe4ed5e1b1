"""A run between parties in one process: the same result as by hand, whoever is killed and whoever does not answer."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.network.federation import TRAINING, Net, tiny_world

from mpunlearn import Training, preprocess
from mpunlearn.checkpoint import checkpoint_digest
from mpunlearn.client import Client
from mpunlearn.errors import NetworkError, PlanError
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.messages import Job, Result, Sealed
from mpunlearn.protocol.plan import pin
from mpunlearn.server.average import average
from mpunlearn.server.federation import Federation
from mpunlearn.server.network.status import describe_status
from mpunlearn.server.updates import examine, updated

QUIET = {"kappa": 0.0, "reparameterization": "none"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Model, forget file, retain file."""
    root = tmp_path_factory.mktemp("world")
    return (root / "model", *tiny_world(root))


def net_of(folder: Path, world: tuple[Path, Path, Path], clients: int = 1, **options: Any) -> Net:
    federation = Federation(**{"clients": clients, **options.pop("federation", {})})
    return Net(folder, world[0], [world[1]] * clients, world[2], federation, **options)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def test_a_run_without_noise_is_unlearning_by_hand(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, rounds=1, copies=1, perturbation=QUIET)
    final = weights(net.run())
    Client(forget=world[1], retain=world[2], training=TRAINING).unlearn(world[0], tmp_path / "update")
    update, start = load_file(tmp_path / "update" / "update.safetensors"), weights(world[0])
    assert any(value.abs().max() > 1e-4 for value in update.values())
    for name, value in final.items():
        torch.testing.assert_close(value, start[name] + update.get(name, 0), rtol=0, atol=1e-7)


def begun(folder: Path, world: tuple[Path, Path, Path], **options: Any) -> Path:
    """A run whose secret exists, to be copied: copies of it must end with the same bytes."""
    net = net_of(folder, world, **options)
    net.coordinator._publish(1)
    return folder


def test_everybody_may_be_started_again_at_any_time(world, tmp_path: Path) -> None:
    template = begun(tmp_path / "template", world, clients=2)
    finals = []
    for again in (False, True):
        folder = tmp_path / str(again)
        shutil.copytree(template, folder)
        net = net_of(folder, world, clients=2)
        for _ in range(60):
            if net.turn():
                break
            if again:
                net.start_server()
                net.workers = [net.start_worker(number) for number in range(2)]
        finals.append(checkpoint_digest(net.final))
    assert finals[0] == finals[1]


class KilledError(BaseException):
    """Stands for kill -9: what comes after it in the program does not happen."""


@pytest.mark.parametrize("party", ["server", "client"])
def test_killed_at_every_point_at_which_something_becomes_durable(
    party: str, world, tmp_path: Path, monkeypatch
) -> None:
    options = {"rounds": 2, "copies": 2}
    template = begun(tmp_path / "template", world, **options)
    shutil.copytree(template, tmp_path / "whole")
    expected = checkpoint_digest(net_of(tmp_path / "whole", world, **options).run())
    rename, unlink, link = Path.rename, Path.unlink, os.link
    counter, limit = [0], [0]

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if counter[0] >= 0:
                counter[0] += 1
                if counter[0] == limit[0]:
                    raise KilledError
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(Path, "rename", counted(rename))
    monkeypatch.setattr(Path, "unlink", counted(unlink))
    monkeypatch.setattr(os, "link", counted(link))
    points, limit[0] = 0, 1
    while True:
        counter[0] = -1
        folder = tmp_path / f"killed-{limit[0]}"
        shutil.copytree(template, folder)
        net = net_of(folder, world, **options)
        killed, counter[0], done = False, 0, False
        for _ in range(60):
            kept = counter[0]
            try:
                for actor, act in (("server", net.coordinator.step), ("", net.carry), ("client", net.workers[0].step)):
                    counter[0] = kept if actor == party else -1
                    found = act()
                    done = done or found is True
                    kept = counter[0] if actor == party else kept
                counter[0] = -1
                net.carry()
                counter[0] = kept
            except KilledError:
                killed, counter[0] = True, -1
                net.start_server()
                net.workers = [net.start_worker(0)]
            if done:
                break
        counter[0] = -1
        assert done, (limit[0], net.said)
        assert checkpoint_digest(net.final) == expected, limit[0]
        shutil.rmtree(folder)
        if not killed:
            break
        points, limit[0] = points + 1, limit[0] + 4
    assert points > 10


def test_two_clients_are_averaged_by_their_weights(world, tmp_path: Path) -> None:
    """Without noise, the result of two equal clients is that of one; of different ones, the weighted mean."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(world[1].read_text().splitlines(keepends=True)[:2])), encoding="utf-8")
    finals = []
    for number, (files, shares) in enumerate((([world[1]], None), ([other], None), ([world[1], other], (1.0, 3.0)))):
        federation = Federation(clients=len(files), weights=shares)
        options: dict[str, Any] = {"rounds": 1, "copies": 1, "perturbation": QUIET}
        net = Net(tmp_path / str(number), world[0], files, world[2], federation, **options)
        finals.append((weights(net.run()), net))
    order = finals[2][1].coordinator._roster()["clients"]
    share = (0.25, 0.75) if order[0] == finals[2][1].identity(0).public else (0.75, 0.25)
    for name, mixed in finals[2][0].items():
        torch.testing.assert_close(
            mixed, share[0] * finals[0][0][name] + share[1] * finals[1][0][name], rtol=0, atol=1e-6
        )
    assert any((finals[0][0][name] - finals[1][0][name]).abs().max() > 1e-4 for name in finals[0][0])


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    shares=st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_the_average_of_factors_is_the_average_of_products(ranks: list[int], shares: list[float], seed: int) -> None:
    import tempfile

    torch.manual_seed(seed)
    products = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, rank in enumerate(ranks):
            (folder / str(number)).mkdir()
            a, b, dense = torch.randn(rank, 6), torch.randn(7, rank), torch.randn(5)
            save_file({"w.lora_A": a, "w.lora_B": b, "v": dense}, folder / str(number) / "update.safetensors")
            entry = {"run": "r", "round": 1, "copy": 1, "copies": 1}
            (folder / str(number) / "update.json").write_text(json.dumps({"format": 1, "mpunlearn": entry}))
            products.append((b @ a, dense))
        mine = shares[: len(ranks)]
        out = average([folder / str(number) for number in range(len(ranks))], mine, folder / "average")
        assert updated(out) == {"w", "v"}
        found = load_file(out / "update.safetensors")
        product = found["w"] if "w" in found else found["w.lora_B"] @ found["w.lora_A"]
        assert ("w" in found) == (sum(ranks) > 6)
        for value, index in ((product, 0), (found["v"], 1)):
            expected = sum(s * p[index] for s, p in zip(mine, products, strict=True)) / sum(mine)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_the_norm_of_factors_is_that_of_their_product(world, tmp_path: Path) -> None:
    from mpunlearn.errors import UpdateError
    from mpunlearn.protocol.exchange import Card

    published = preprocess(world[0], state=tmp_path / "state", out=tmp_path / "copies").copies[0]
    entry = json.loads((published / "config.json").read_text())["mpunlearn"]
    name = "model.layers.0.self_attn.q_proj.weight"
    norm = float(sum(value.square().sum() for value in weights(world[0]).values()) ** 0.5)
    for size, passes in ((0.9, True), (1.1, False)):
        folder = tmp_path / str(size)
        folder.mkdir()
        a, b = torch.randn(2, 32), torch.randn(32, 2)
        b *= size * norm / (b @ a).norm()
        save_file({f"{name}.lora_A": a, f"{name}.lora_B": b.contiguous()}, folder / "update.safetensors")
        (folder / "update.json").write_text(json.dumps({"format": 1, "mpunlearn": entry}))
        if passes:
            examine(folder, published, world[0], Card(**entry), factored=True, expected={name})
            continue
        with pytest.raises(UpdateError, match="norm is 1.1"):
            examine(folder, published, world[0], Card(**entry), factored=True)


def test_with_lora_over_the_network(world, tmp_path: Path) -> None:
    training = Training(objective="simnpo", epochs=1, batch_size=4, learning_rate=1e-3, lora_rank=2)
    net = net_of(tmp_path / "net", world, clients=2, rounds=1, training=training)
    final, start = weights(net.run()), weights(world[0])
    assert any(not torch.equal(final[name], start[name]) for name in final)


def test_with_assign_one_nobody_holds_two_copies_of_a_round(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, clients=2, federation={"assign": "one"})
    net.run()
    given = [line for line in net.said if line.endswith("unlearning")]
    assert sorted(given) == sorted(f"round {r} of 2, copy {c} of 2: unlearning" for r in (1, 2) for c in (1, 2))
    for number in range(2):
        done = json.loads((net.folder / f"work-{number}" / "copies.json").read_text())
        assert len({name.split("-copy-")[1] for name in done}) == 1
        assert len(done) == 2
    with pytest.raises(PlanError, match="as many --clients as --copies"):
        net_of(tmp_path / "three", world, clients=3, federation={"assign": "one"})


def until(net: Net, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if net.turn():
            return
    raise AssertionError(net.said)


def test_a_client_that_does_not_answer_is_dropped_where_a_quorum_allows_it(world, tmp_path: Path) -> None:
    federation = {"deadline": 6.0, "quorum": 1}
    net = net_of(tmp_path / "net", world, clients=2, rounds=1, federation=federation, silent={1})
    until(net)
    silent = net.identity(1).public
    assert any(
        line.startswith(f"goes on without client {silent[:16]}: it has not answered for copy 1, 2") for line in net.said
    )
    alone = net_of(tmp_path / "alone", world, rounds=1)
    assert set(weights(net.final)) == set(weights(alone.run()))
    assert silent in net.coordinator._roster()["dropped"]
    pin(net.folder / "server" / "plan.json", {}, net.folder)
    assert "complete, round 1 of 1" in describe_status(net.folder / "server")


def test_a_client_that_does_not_answer_ends_the_round_and_is_named(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, clients=2, rounds=1, federation={"deadline": 6.0}, silent={1})
    with pytest.raises(
        NetworkError, match=f"client {net.identity(1).public[:16]} has not answered for copy 1, 2 of round 1"
    ):
        until(net)
    # Settled: it answers now, and the run goes on with what there is.
    net.silent = set()
    net.federation = Federation(clients=2)
    net.start_server()
    until(net)
    assert net.final.is_dir()


def test_a_copy_is_never_left_out_of_a_clients_average(world, tmp_path: Path) -> None:
    """One copy of two is answered: the client counts as not answering, in both."""
    net = net_of(tmp_path / "net", world, clients=2, rounds=1, federation={"deadline": 6.0, "quorum": 1})
    late = net.identity(1).public

    def tamper(node: str, name: str, data: bytes) -> bytes | None:
        out = net.coordinator._out.get(name)
        return None if out is not None and out.job.client == late and out.job.copy == 2 else data

    net.tamper = tamper
    aggregated: list[Any] = []
    aggregate = net.coordinator._aggregate
    net.coordinator._aggregate = lambda number, pairs, roster: (
        aggregated.extend(pairs),
        aggregate(number, pairs, roster),
    )
    until(net)
    assert aggregated == [(net.identity(0).public, 1), (net.identity(0).public, 2)]
    assert any(late[:16] in line and "update of copy 1" in line for line in net.said)


def test_status_says_how_far_a_run_is(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, clients=2, rounds=1)
    pin(net.folder / "server" / "plan.json", {}, net.folder)
    assert describe_status(net.folder / "server") == "not begun"
    shown = set()
    while not net.turn():
        shown |= set(describe_status(net.folder / "server").splitlines())
    assert any("waiting for clients, round 1 of 1" in line for line in shown)
    client = net.identity(0).public[:16]
    assert any(line.startswith(f"client {client}: connected, 0 of 2 updates") for line in shown)
    size = sum(file.stat().st_size for file in (world[0]).glob("*")) / 1e6
    assert any(line.startswith("copies: 2 of ") and abs(float(line.split()[3]) - size) < 0.2 for line in shown)
    assert "complete, round 1 of 1" in describe_status(net.folder / "server")


def test_a_refusal_names_the_client_and_the_run_goes_on_when_it_is_settled(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, rounds=1, policy={"max_copies": 1})
    with pytest.raises(NetworkError, match=r"refuses copy [12] of round 1: max copies is 1, asked for 2"):
        until(net)
    net.policy = {}
    net.workers = [net.start_worker(0)]
    net.start_server()
    until(net)


def test_a_client_that_the_server_was_not_told_of_is_not_let_in(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world)
    net.start_server(trusted=["0" * 64])
    for _ in range(4):
        net.turn()
    assert any("is not one of this run's" in line for line in net.said)
    assert not net.coordinator._out or all(out.job.client == "0" * 64 for out in net.coordinator._out.values())
    assert not list((net.folder / "work-0").glob("copies/*"))


def test_a_node_that_comes_back_under_another_number_gets_its_jobs(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, rounds=1)
    while not net.coordinator._roster()["nodes"]:
        net.carry()
        net.workers[0].step()
        net.carry()
        net.coordinator.step()
    assert list(net.coordinator._roster()["nodes"]) == ["1"]
    (net.coordinator.mail / "nodes" / "1").rename(net.coordinator.mail / "nodes" / "77")
    load, unload = net.mail.load, net.mail.unload
    net.mail.load = lambda node: load("77")  # type: ignore[method-assign]
    net.mail.unload = lambda node, record: unload("77", record)  # type: ignore[method-assign]
    net.run()
    assert list(net.coordinator._roster()["nodes"]) == ["77"]


def test_through_a_store_that_is_a_folder(world, tmp_path: Path) -> None:
    store = tmp_path / "store"
    net = net_of(
        tmp_path / "net",
        world,
        federation={"store": str(store)},
        policy={"stores": [store.as_uri()]},
    )
    sizes = []

    def tamper(node: str, name: str, data: bytes) -> bytes:
        sizes.append(len(data))
        return data

    net.tamper = tamper
    net.run()
    assert max(sizes) < 10_000  # no weights in the messages
    assert not [file for file in store.rglob("*") if file.is_file()]  # and nothing is left


def test_a_file_that_was_damaged_in_the_store_is_asked_for_again(world, tmp_path: Path) -> None:
    store = tmp_path / "store"
    options = {"federation": {"store": str(store)}, "policy": {"stores": [store.as_uri()]}, "rounds": 1}
    net = net_of(tmp_path / "net", world, **options)
    damaged: list[Path] = []

    def tamper(node: str, name: str, data: bytes) -> bytes:
        found = [file for file in store.rglob("*") if "updates" in file.parts and file.is_file()]
        if found and not damaged:
            largest = max(found, key=lambda file: file.stat().st_size)
            damaged.append(largest)
            largest.write_bytes(largest.read_bytes()[:-7])
        return data

    net.tamper = tamper
    net.run()
    assert any(line.startswith("refused") and "damaged or incomplete" in line for line in net.said)
    assert sum(line.endswith("unlearning") for line in net.said) == 2  # not trained again


def test_urls_that_have_run_out_are_made_anew(world, tmp_path: Path) -> None:
    store = tmp_path / "store"
    options = {"federation": {"store": str(store)}, "policy": {"stores": [store.as_uri()]}, "rounds": 1}
    net = net_of(tmp_path / "net", world, **options)
    while not net.coordinator._out:
        net.turn()
    old = set(net.coordinator._out)
    file = net.folder / "server" / "exchange" / "round-1" / "files.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "signed": time.time() - 8 * 86400}))
    net.start_server()
    net.coordinator.step()
    assert net.coordinator._out
    assert not old & set(net.coordinator._out)
    assert {file.name for file in (net.coordinator.mail / "outbox" / "1").iterdir()} == set(net.coordinator._out)
    net.run()


def test_a_copy_too_large_for_a_message_needs_a_store(world, tmp_path: Path, monkeypatch) -> None:
    from mpunlearn.server.network import coordinator

    monkeypatch.setattr(coordinator, "MAX_INLINE_BYTES", 1000)
    with pytest.raises(PlanError, match="--store: a copy or its update has"):
        net_of(tmp_path / "net", world).run()


def test_through_s3_with_signed_urls_and_no_account_at_the_client(world, tmp_path: Path, monkeypatch) -> None:
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "server"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", url),
        ):
            monkeypatch.setenv(name, value)
        bucket = boto3.client("s3")
        bucket.create_bucket(Bucket="mpu")
        net = net_of(
            tmp_path / "net", world, rounds=1, federation={"store": "s3://mpu/runs"}, policy={"stores": [f"{url}/mpu"]}
        )
        net.coordinator.step()
        files = json.loads((net.folder / "server/exchange/round-1/files.json").read_text())["copies"]["copy-1"]
        assert all("Signature=" in file["url"] for file in files)
        net.run()
        assert net.final.is_dir()
        assert not bucket.list_objects_v2(Bucket="mpu").get("Contents")
        assert not any("Signature" in line for line in net.said)
    finally:
        server.stop()


def test_an_error_does_not_show_a_signature(tmp_path: Path) -> None:
    from mpunlearn.protocol.messages import File
    from mpunlearn.protocol.transfer import fetch, put

    url = "http://127.0.0.1:9/bucket/key?X-Amz-Signature=hush"
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NetworkError) as caught:
        fetch(url, File("x", 1, "0" * 64), tmp_path / "x")
    assert "hush" not in str(caught.value)
    assert "127.0.0.1:9/bucket/key" in str(caught.value)
    with pytest.raises(NetworkError) as caught:
        put(tmp_path / "file", url)
    assert "hush" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_courier_takes_what_it_asked_for_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    from mpunlearn.protocol.flower.courier import mail as module

    mail, name = module.Mail(tmp_path), "a" * 64
    (tmp_path / "outbox" / "1").mkdir(parents=True)
    (tmp_path / "inbox").mkdir()
    (tmp_path / "outbox" / "1" / name).write_bytes(b"job")
    monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", 10)
    for record in (
        {},
        {"names": name, "results": [b"x"], "missing": []},
        {"names": [name], "results": ["text"], "missing": []},
        {"names": [name], "results": [b"x" * 11], "missing": []},
        {"names": ["../../escaped"], "results": [b"x"], "missing": []},
        {"names": ["b" * 64], "results": [b"x"], "missing": []},
    ):
        mail.unload("1", record)
        assert not list((tmp_path / "inbox").iterdir())
    mail.unload("1", {"names": [name], "results": [b"x"], "missing": []})
    assert [file.name for file in (tmp_path / "inbox").iterdir()] == [f"1-{name}"]


def test_a_job_that_was_lost_on_the_way_is_delivered_again(tmp_path: Path) -> None:
    from mpunlearn.protocol.flower.courier.mail import Mail

    mail, name = Mail(tmp_path), "a" * 64
    (tmp_path / "outbox" / "1").mkdir(parents=True)
    (tmp_path / "outbox" / "1" / name).write_bytes(b"job")
    record = mail.load("1")
    assert record is not None
    assert record["jobs"] == [b"job"]
    again = mail.load("1")
    assert again is not None
    assert again["jobs"] == []  # on its way
    mail.unload("1", {"names": [], "results": [], "missing": [name]})
    last = mail.load("1")
    assert last is not None
    assert last["jobs"] == [b"job"]


def test_late_clients_are_dropped_together_or_not_at_all(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, clients=3, rounds=1, federation={"deadline": 6.0, "quorum": 2}, silent={1, 2})
    late = [net.identity(number).public[:16] for number in (1, 2)]
    with pytest.raises(NetworkError) as caught:
        until(net)
    assert all(client in str(caught.value) for client in late)
    assert not net.coordinator._roster()["dropped"]


def test_the_first_client_does_not_decide_what_all_must_train(world, tmp_path: Path) -> None:
    """With LoRA the plan does not name the tensors: who differs from most is gone on without, whoever came first."""
    training = Training(objective="simnpo", epochs=1, batch_size=4, learning_rate=1e-3, lora_rank=2)
    net = net_of(tmp_path / "net", world, clients=3, rounds=1, training=training, federation={"quorum": 2})
    odd = net.identity(0).public
    aggregate, agree = net.coordinator._rounds.aggregate, net.coordinator._agree

    def narrowed(number: int, pairs: list[tuple[str, int]]) -> bool:
        for file in net.folder.glob(f"server/exchange/round-1/updates/{odd}/copy-*/update.safetensors"):
            found = load_file(file)
            name = min(found).removesuffix(".lora_A")
            save_file({key: value for key, value in found.items() if key.startswith(name)}, file)
        return agree(number, pairs)

    net.coordinator._agree = narrowed  # type: ignore[method-assign]
    net.run()
    assert aggregate is not None
    assert list(net.coordinator._roster()["dropped"]) == [odd]


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        (torch.full((1, 32), 1e37), torch.full((32, 1), 1e-39), "overflow in another basis"),
        (torch.tensor([[1e10], [-1e10]]).expand(2, 32), torch.full((32, 2), 1e10), "cancel"),
    ],
)
def test_factors_that_another_basis_would_spoil_are_refused(world, tmp_path: Path, a, b, why: str) -> None:
    from mpunlearn.errors import UpdateError
    from mpunlearn.protocol.exchange import Card

    published = preprocess(world[0], state=tmp_path / "state", out=tmp_path / "copies").copies[0]
    entry = json.loads((published / "config.json").read_text())["mpunlearn"]
    name = "model.layers.0.self_attn.q_proj.weight"
    (tmp_path / "update").mkdir()
    save_file(
        {f"{name}.lora_A": a.contiguous(), f"{name}.lora_B": b.contiguous()}, tmp_path / "update" / "update.safetensors"
    )
    (tmp_path / "update" / "update.json").write_text(json.dumps({"format": 1, "mpunlearn": entry}))
    with pytest.raises(UpdateError, match=why):
        examine(tmp_path / "update", published, world[0], Card(**entry), factored=True)


def test_a_store_that_is_away_between_rounds_does_not_end_the_run(world, tmp_path: Path, monkeypatch) -> None:
    store = tmp_path / "store"
    options = {"federation": {"store": str(store)}, "policy": {"stores": [store.as_uri()]}, "rounds": 2}
    net = net_of(tmp_path / "net", world, **options)
    failures = {"remove": 3, "put": 3}

    def failing(name: str) -> Any:
        action = getattr(net.coordinator._store, name)

        def call(*arguments: Any) -> Any:
            if (
                net.coordinator._going and failures[name]
            ):  # not at the very first step, where it would be a wrong option
                failures[name] -= 1
                raise NetworkError(f"{name}: the store is away")
            return action(*arguments)

        return call

    for name in failures:
        monkeypatch.setattr(net.coordinator._store, name, failing(name))
    net.run()
    assert failures == {"remove": 0, "put": 0}
    assert [line for line in net.said if "trying on" in line] == [
        f"{name}: the store is away; trying on" for name in ("remove", "put")
    ]
    assert not list(store.rglob("*.safetensors"))


def test_a_node_whose_first_answer_was_damaged_is_asked_again(world, tmp_path: Path, monkeypatch) -> None:
    from mpunlearn.server.network import coordinator

    monkeypatch.setattr(coordinator, "RETRY_SECONDS", 0.0)
    net = net_of(tmp_path / "net", world, rounds=1)
    damaged: list[str] = []

    def tamper(node: str, name: str, data: bytes) -> bytes:
        damaged.append(name)
        return data if len(damaged) > 1 else b"noise"

    net.tamper = tamper
    net.run()
    assert any(line.startswith("refused") for line in net.said)


def test_the_deadline_begins_when_all_clients_are_there_and_waits_for_the_store(
    world, tmp_path: Path, monkeypatch
) -> None:
    net = net_of(tmp_path / "net", world, rounds=1, federation={"deadline": 1000.0})
    while not net.coordinator._out:
        net.turn()
    roster, missing = net.coordinator._roster(), [(net.identity(0).public, 1)]
    check = net.coordinator._check_deadline
    check(1, missing, roster["complete"] + 999)
    with pytest.raises(NetworkError, match="has not answered"):
        check(1, missing, time.time() + 1001)
    net.coordinator._keep({**roster, "complete": time.time() + 500})
    check(1, missing, time.time() + 1001)  # the last of them came later
    net.coordinator._keep(roster)
    net.coordinator._unfetched.add(net.identity(0).public)
    check(1, missing, time.time() + 1999)
    with pytest.raises(NetworkError, match="has not answered"):
        check(1, missing, time.time() + 2001)


def test_an_update_too_large_for_a_message_needs_a_store(world, tmp_path: Path, monkeypatch) -> None:
    """A 16-bit copy that fits has a float32 update that does not."""
    from mpunlearn.server.network import coordinator

    perturbation = {"publish_dtype": "bfloat16"}
    size = sum(file.stat().st_size for file in world[0].glob("*.safetensors"))
    monkeypatch.setattr(coordinator, "MAX_INLINE_BYTES", int(0.75 * size) + coordinator.UPDATE_OVERHEAD_BYTES)
    training = Training(objective="simnpo", train="all")
    with pytest.raises(PlanError, match="or its update has"):
        net_of(tmp_path / "net", world, training=training, perturbation=perturbation).run()


def test_links_and_pipes_in_a_store_are_not_followed(tmp_path: Path) -> None:
    from mpunlearn.errors import DamagedError
    from mpunlearn.protocol.messages import File
    from mpunlearn.protocol.transfer import fetch, put

    (tmp_path / "store").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(NetworkError, match="leads through a link"):
        put(tmp_path / "file", (tmp_path / "store" / "link" / "0").as_uri())
    assert not list((tmp_path / "precious").iterdir())
    os.mkfifo(tmp_path / "store" / "pipe")
    (tmp_path / "store" / "away").symlink_to(tmp_path / "file")
    listed = File("x", 1, hashlib.sha256(b"x").hexdigest())
    for name in ("pipe", "away", "link", "nothing"):
        with pytest.raises(DamagedError):
            fetch((tmp_path / "store" / name).as_uri(), listed, tmp_path / "got")
    put(tmp_path / "file", (tmp_path / "store" / "deep" / "0").as_uri())
    fetch((tmp_path / "store" / "deep" / "0").as_uri(), listed, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"x"


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    from mpunlearn.protocol.messages import File
    from mpunlearn.protocol.transfer import fetch

    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "1")
            self.end_headers()
            self.wfile.write(b"x")

        def log_message(self, *_: Any) -> None:
            pass

    listed = File("x", 1, hashlib.sha256(b"x").hexdigest())
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(NetworkError):
            fetch(f"{url}/away", listed, tmp_path / "away")
        fetch(f"{url}/here", listed, tmp_path / "here")
        server.shutdown()
    assert "/elsewhere" not in asked
    assert (tmp_path / "here").read_bytes() == b"x"
    assert not (tmp_path / "away").exists()


def test_a_store_that_is_away_for_a_while_is_not_the_clients_fault(world, tmp_path: Path, monkeypatch) -> None:
    store = tmp_path / "store"
    options = {"federation": {"store": str(store)}, "policy": {"stores": [store.as_uri()]}, "rounds": 1}
    net = net_of(tmp_path / "net", world, **options)
    fetch, failures = net.coordinator._store.fetch, [5]

    def failing(*arguments: Any) -> None:
        if failures[0]:
            failures[0] -= 1
            raise NetworkError("away")
        fetch(*arguments)

    monkeypatch.setattr(net.coordinator._store, "fetch", failing)
    net.run()
    assert failures == [0]
    assert sum("cannot take a message" in line for line in net.said) == 5


def test_what_is_said_cannot_move_the_cursor(capsys) -> None:
    from mpunlearn.progress import say

    say("a\x1b[2Jb\ud800\nc ä")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\ud800\\nc ä\n"


def test_impossible_federations_are_refused() -> None:
    for options, why in (
        ({"clients": 0}, "--clients"),
        ({"assign": "some"}, "--assign"),
        ({"deadline": 0.0}, "--deadline"),
        ({"clients": 2, "quorum": 3}, "--quorum"),
        ({"clients": 2, "quorum": 1, "assign": "one"}, "--quorum"),
        ({"clients": 2, "weights": (1.0,)}, "--weights"),
        ({"clients": 2, "weights": (1.0, -1.0)}, "--weights"),
        ({"clients": 2, "weights": (1.0, 1.0), "assign": "one"}, "--weights"),
    ):
        with pytest.raises(PlanError, match=why):
            Federation(**options)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    from mpunlearn.errors import StateError

    first = Identity.at(tmp_path / "key")
    assert Identity.at(tmp_path / "key").public == first.public
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(StateError, match="chmod 600"):
        Identity.at(tmp_path / "key")


def test_a_pinned_plan_is_not_changed(tmp_path: Path) -> None:
    pin(tmp_path / "run" / "plan.json", {"rounds": 2}, tmp_path / "run")
    pin(tmp_path / "run" / "plan.json", {"rounds": 2}, tmp_path / "run")
    with pytest.raises(PlanError, match="another rounds"):
        pin(tmp_path / "run" / "plan.json", {"rounds": 3}, tmp_path / "run")


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=400), prefix=st.sampled_from([b"", b"MPU1", b"MPU1\x10\0\0\0{"]))
def test_bytes_that_are_no_message_are_refused_and_nothing_else(data: bytes, prefix: bytes) -> None:
    from mpunlearn.errors import MessageError

    with pytest.raises(MessageError):
        Sealed.open(prefix + data)


def test_messages_survive_the_round_trip(tmp_path: Path) -> None:
    from mpunlearn.protocol.messages import File, seal

    identity = Identity.at(tmp_path / "key")
    job = Job(
        "0" * 32, "1" * 64, 1, 2, 1, 3, TRAINING.plain(), [File("config.json", 3, "0" * 64, "s3://b/k")], ["s3://b/s"]
    )
    for message in (job, Result("0" * 32, "2" * 64, refusal="näh")):
        opened = Sealed.open(seal(message, identity), identity.public)
        assert opened.message == message
        assert opened.sender == identity.public
