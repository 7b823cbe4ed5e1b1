"""Runs whose copies and updates travel through a store: a folder or S3, also one that is damaged, full or away."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.network.federation import net_of

from mpunlearn import Training
from mpunlearn.errors import NetworkError, PlanError
from mpunlearn.server.network import publication
from mpunlearn.server.updates import OVERHEAD_BYTES


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
    assert any(line.startswith("rejected") and "damaged or incomplete" in line for line in net.said)
    assert sum(line.endswith("unlearning") for line in net.said) == 2  # not trained again


def test_urls_that_have_run_out_are_made_anew(world, tmp_path: Path) -> None:
    store = tmp_path / "store"
    options = {"federation": {"store": str(store)}, "policy": {"stores": [store.as_uri()]}, "rounds": 1}
    net = net_of(tmp_path / "net", world, **options)
    while not net.coordinator.jobs.open:
        net.turn()
    old = set(net.coordinator.jobs.open)
    file = net.folder / "server" / "exchange" / "round-1" / "files.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "signed": time.time() - 8 * 86400}))
    net.start_server()
    net.coordinator.step()
    assert net.coordinator.jobs.open
    assert not old & set(net.coordinator.jobs.open)
    assert {file.name for file in (net.coordinator.folder.mail / "outbox" / "1").iterdir()} == set(
        net.coordinator.jobs.open
    )
    net.run()


def test_a_copy_too_large_for_a_message_needs_a_store(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(publication, "MAX_INLINE_BYTES", 1000)
    with pytest.raises(PlanError, match="--store: a copy or its update has"):
        net_of(tmp_path / "net", world).run()


@pytest.mark.slow
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


def test_a_store_that_is_away_between_rounds_does_not_end_the_run(world, tmp_path: Path, monkeypatch) -> None:
    store = tmp_path / "store"
    options = {"federation": {"store": str(store)}, "policy": {"stores": [store.as_uri()]}, "rounds": 2}
    net = net_of(tmp_path / "net", world, **options)
    failures, steps = {"remove": 3, "put": 3}, [0]
    step = net.coordinator.step

    def counted() -> bool:
        steps[0] += 1
        return step()

    net.coordinator.step = counted  # type: ignore[method-assign]

    def failing(name: str) -> Any:
        action = getattr(net.store, name)

        def call(*arguments: Any) -> Any:
            if steps[0] > 1 and failures[name]:  # not at the very first step, where it would be a wrong option
                failures[name] -= 1
                raise NetworkError(f"{name}: the store is away")
            return action(*arguments)

        return call

    for name in failures:
        monkeypatch.setattr(net.store, name, failing(name))
    net.run()
    assert failures == {"remove": 0, "put": 0}
    assert [line for line in net.said if "retrying" in line] == [
        f"{name}: the store is away; retrying" for name in ("remove", "put")
    ]
    assert not list(store.rglob("*.safetensors"))


def test_an_update_too_large_for_a_message_needs_a_store(world, tmp_path: Path, monkeypatch) -> None:
    """A 16-bit copy that fits has a float32 update that does not."""
    perturbation = {"publish_dtype": "bfloat16"}
    size = sum(file.stat().st_size for file in world[0].glob("*.safetensors"))
    monkeypatch.setattr(publication, "MAX_INLINE_BYTES", int(0.75 * size) + OVERHEAD_BYTES)
    training = Training(objective="simnpo", train="all")
    with pytest.raises(PlanError, match="or its update has"):
        net_of(tmp_path / "net", world, training=training, perturbation=perturbation).run()


def test_a_store_that_is_away_for_a_while_is_not_the_clients_fault(world, tmp_path: Path, monkeypatch) -> None:
    store = tmp_path / "store"
    options = {"federation": {"store": str(store)}, "policy": {"stores": [store.as_uri()]}, "rounds": 1}
    net = net_of(tmp_path / "net", world, **options)
    fetch, failures = net.store.fetch, [5]

    def failing(*arguments: Any) -> None:
        if failures[0]:
            failures[0] -= 1
            raise NetworkError("away")
        fetch(*arguments)

    monkeypatch.setattr(net.store, "fetch", failing)
    net.run()
    assert failures == [0]
    assert sum("cannot process a message" in line for line in net.said) == 5
