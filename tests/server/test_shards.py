"""The passes one shard at a time: the same bytes in one go, in parts, in a store, and on a cluster."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.perturbations import without_offset
from tests.storage_server import s3_server

from mpunlearn.checkpoint import Checkpoint, TensorWriter, checkpoint_digest
from mpunlearn.cli import main
from mpunlearn.errors import FileError, PlanError, StateError
from mpunlearn.protocol.record.artifacts import artifact_files, file_digests
from mpunlearn.protocol.record.log import event_of
from mpunlearn.server import parts
from mpunlearn.server.lineage import Lineage, open_offset
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess
from mpunlearn.server.state import ServerState
from mpunlearn.storage import MANIFEST, StorePath, as_place

SMALL = 1e-5
"""GB of a shard, so that the tiny model has several."""
PERTURBATION = without_offset(copies=3, kappa=0.05)


def same_state(folder: Path) -> Path:
    """A state with a fixed key."""
    folder.mkdir(mode=0o700)
    (folder / "secret.key").write_bytes(bytes(range(32)))
    (folder / "secret.key").chmod(0o600)
    (folder / "state.json").write_text(json.dumps({"format": 1, "run": "0" * 32}))
    return folder


def contents(folder: Path | StorePath) -> dict[str, str]:
    """The digest of every file of a copy, without its event, which has a time."""
    return {file.name: file.sha256 for file in file_digests(artifact_files(folder))}


def synthetic(copy: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """An update of every tensor of a copy."""
    source = Checkpoint(copy)
    out.mkdir(parents=True)
    (out / "update.json").write_text(json.dumps({"format": 1, "mpunlearn": source.config["mpunlearn"]}))
    with TensorWriter(out, {name: (dtype, info.shape) for name, info in source.tensors.items()}, "update") as writer:
        for name in source.tensors:
            writer.write(name, (source.read(name).float() / 64).to(dtype))
    return out


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    with s3_server() as environment:
        yield environment


@pytest.fixture
def bucket(store, monkeypatch, tmp_path) -> str:
    """The prefix of a test in the bucket."""
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    return f"s3://mpu/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"


def upload(folder: Path, url: str) -> str:
    place = as_place(url, "test")
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return url


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_parts_are_the_same_bytes_as_one_go(save_tiny, tmp_path: Path, model_type: str) -> None:
    """Also where the experts of a copy lie in other shards than those of the model."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8} if model_type == "qwen3_moe" else {}
    path = save_tiny(model_type=model_type, dtype=torch.bfloat16, **sizes)
    options = {"perturbation": PERTURBATION, "max_shard_size": SMALL}
    whole = preprocess(path, state=same_state(tmp_path / "a"), out=tmp_path / "whole", **options)
    state, out = same_state(tmp_path / "b"), tmp_path / "parts"
    for shard in ("2/3", "1/3"):
        assert preprocess(path, state=state, out=out, shard=shard, **options).shards
    with pytest.raises(FileError, match=r"shards are missing \(3"):
        preprocess(path, state=state, out=out, finish=True, **options)
    assert not out.exists()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / ".parts.shards").rglob("*.safetensors")}
    written = preprocess(path, state=state, out=out, shard="1/3", **options)  # again
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / ".parts.shards").rglob("*.safetensors")}
    assert written.of_shards > 5
    preprocess(path, state=state, out=out, shard="3/3", **options)
    finished = preprocess(path, state=state, out=out, finish=True, **options)
    assert [contents(copy) for copy in finished.copies] == [contents(copy) for copy in whole.copies]
    assert finished.rounding == pytest.approx(whole.rounding) or finished.rounding == whole.rounding
    assert all(event_of(copy) is not None for copy in finished.copies)  # reads and checks all files
    assert sorted(file.name for file in out.iterdir()) == ["copy-1", "copy-2", "copy-3"]
    assert not (tmp_path / ".parts.shards").exists()
    with pytest.raises(FileError, match="already exists"):
        preprocess(path, state=state, out=out, shard="1/3", **options)


def test_a_damaged_shard_is_written_again(save_tiny, tmp_path: Path) -> None:
    path, options = save_tiny(), {"perturbation": PERTURBATION, "max_shard_size": SMALL}
    whole = preprocess(path, state=same_state(tmp_path / "a"), out=tmp_path / "whole", **options)
    state, out = same_state(tmp_path / "b"), tmp_path / "parts"
    preprocess(path, state=state, out=out, shard="1/1", **options)
    shard = sorted((tmp_path / ".parts.shards" / "copy-2").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(FileError, match=r"1 of \d+ shards are missing \(2\)"):
        preprocess(path, state=state, out=out, finish=True, **options)
    preprocess(path, state=state, out=out, shard="2/2", **options)
    finished = preprocess(path, state=state, out=out, finish=True, **options)
    assert [contents(copy) for copy in finished.copies] == [contents(copy) for copy in whole.copies]


def test_parts_need_the_same_options_and_the_same_model(save_tiny, tmp_path: Path) -> None:
    path, state, out = save_tiny(), tmp_path / "s", tmp_path / "c"
    with pytest.raises(FileError, match="no shard was written yet"):
        preprocess(path, state=state, out=out, finish=True)
    assert not state.exists()
    preprocess(path, state=state, out=out, shard="1/2", max_shard_size=SMALL, perturbation=PERTURBATION)
    with pytest.raises(StateError, match="was begun with max-shard-size 1e-05, found 5.0"):
        preprocess(path, state=state, out=out, shard="2/2", perturbation=PERTURBATION)
    (file,) = path.glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 4] + bytes(byte ^ 1 for byte in data[len(data) // 4 :]))
    with pytest.raises(StateError, match="has changed since round 1 was published"):
        preprocess(path, state=state, out=out, shard="2/2", max_shard_size=SMALL, perturbation=PERTURBATION)
    for text in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(PlanError, match="expected I/N"):
            parts.parse_shard(text)
    with pytest.raises(PlanError, match="only one of them"):
        preprocess(path, state=state, out=out, shard="1/2", finish=True)


def test_what_a_worker_gets_has_the_keys_of_its_shard_only(save_tiny, tmp_path: Path) -> None:
    """With common noise: neither the run's key nor the lineage's, and no stream of another shard."""
    from mpunlearn.server.copies import Copies
    from mpunlearn.server.perturbation import Perturbation

    path = save_tiny(dtype=torch.bfloat16)
    perturbation = Perturbation(copies=2, kappa=0.05)
    out = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=perturbation, max_shard_size=SMALL)
    server = ServerState(tmp_path / "s")
    record = server.rounds[0]
    target = tmp_path / "again"
    target.mkdir()
    source, offset = Checkpoint(path), open_offset(record.offset)
    copies = Copies(source, server.run, record, server.secret, offset, target, int(SMALL * 1e9), torch.device("cpu"))
    lineage = Lineage(Path(record.offset.lineage))
    tasks = [copies.task(number) for number in range(len(copies.shards))]
    sent = [pickle.dumps(task) for task in tasks]
    for secret in (server.secret, lineage.secret):
        assert not any(secret._key in data for data in sent)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(secret)
    name = "model.layers.1.mlp.down_proj.weight"
    keys = [server.secret.key("noise", record.inputs, 0, name), lineage.secret.key("common noise", name)]
    holds = [name in shard.tensors for shard in copies.shards]
    assert 0 < sum(holds) < len(holds)
    for key in keys:
        assert [key in data for data in sent] == holds
    for data in sent:
        pickle.loads(data)()
    for copy in (1, 2):
        for shard in (out.copies[copy - 1]).glob("*.safetensors"):
            assert (target / f"copy-{copy}" / shard.name).read_bytes() == shard.read_bytes()


def test_the_passes_over_a_store_are_the_same_bytes_as_on_a_disk(save_tiny, tmp_path: Path, bucket: str) -> None:
    path = save_tiny(dtype=torch.bfloat16)
    options = {"perturbation": PERTURBATION, "max_shard_size": SMALL}
    local = preprocess(path, state=same_state(tmp_path / "a"), out=tmp_path / "local", **options)
    model = upload(path, f"{bucket}/model")
    state = same_state(tmp_path / "b")
    stored = preprocess(model, state=state, out=f"{bucket}/copies", **options)
    assert [str(copy) for copy in stored.copies] == [f"{bucket}/copies/copy-{copy}" for copy in (1, 2, 3)]
    assert [contents(copy) for copy in stored.copies] == [contents(copy) for copy in local.copies]
    assert event_of(stored.copies[0]) is not None
    with pytest.raises(FileError, match="already exists"):
        preprocess(model, state=state, out=f"{bucket}/copies", **options)
    updates = [synthetic(copy, tmp_path / f"u{number}") for number, copy in enumerate(local.copies)]
    urls = [upload(update, f"{bucket}/u{number}") for number, update in enumerate(updates)]
    final = postprocess(updates, state=tmp_path / "a", out=tmp_path / "final", max_shard_size=SMALL)
    there = postprocess(urls, state=state, out=f"{bucket}/final", max_shard_size=SMALL)
    assert contents(there) == contents(final)
    assert checkpoint_digest(there) == checkpoint_digest(final)
    again = preprocess(there, state=state, out=f"{bucket}/second", **options)  # the result is the next round's model
    assert again.round == 2


def test_parts_in_a_store(save_tiny, tmp_path: Path, bucket: str) -> None:
    path = save_tiny(dtype=torch.bfloat16)
    options = {"perturbation": PERTURBATION, "max_shard_size": SMALL}
    whole = preprocess(path, state=same_state(tmp_path / "a"), out=tmp_path / "whole", **options)
    state, out = same_state(tmp_path / "b"), f"{bucket}/copies"
    for shard in ("1/2", "2/2"):
        preprocess(path, state=state, out=out, shard=shard, **options)
        assert not (as_place(f"{out}/copy-1", "test") / MANIFEST).is_file()
    finished = preprocess(path, state=state, out=out, finish=True, **options)
    assert [contents(copy) for copy in finished.copies] == [contents(copy) for copy in whole.copies]
    assert not [name for name in as_place(out, "test").below() if ".shards" in name]


def test_readers_of_a_directory_in_a_store_go_by_its_manifest(save_tiny, tmp_path: Path, bucket: str) -> None:
    path = save_tiny()
    options = {"state": tmp_path / "s", "perturbation": PERTURBATION}
    copy = preprocess(path, out=f"{bucket}/c", **options).copies[0]
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"left by another attempt")
    assert "model-00001-of-00002.safetensors" not in contents(copy)
    Checkpoint(copy)
    (copy / "config.json").write_bytes(b"{}")
    with pytest.raises(FileError, match="config.json is missing or not as long as manifest.json says"):
        Checkpoint(copy)


def test_a_failure_leaves_nothing_in_a_store(save_tiny, tmp_path: Path, bucket: str, monkeypatch) -> None:
    path = save_tiny()
    from mpunlearn.server.publisher import Publisher

    publish, calls = Publisher.publish, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return publish(self, *arguments)

    monkeypatch.setattr(Publisher, "publish", failing)
    with pytest.raises(KeyboardInterrupt):
        preprocess(path, state=tmp_path / "s", out=f"{bucket}/c", max_shard_size=SMALL, perturbation=PERTURBATION)
    assert as_place(f"{bucket}/c", "test").below() == []
    assert not (tmp_path / "s").exists()


NO_DISK = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
from mpunlearn.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_no_weights_land_on_the_disk(save_tiny, tmp_path: Path, bucket: str) -> None:
    """The system refuses to write files as long as a tensor; and what is written are the state and the lineage."""
    path = save_tiny(hidden_size=64, intermediate_size=256)
    assert all(info.nbytes > 40_000 for name, info in Checkpoint(path).tensors.items() if "mlp" in name)
    model, scratch = upload(path, f"{bucket}/model"), tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "XDG_DATA_HOME": str(scratch / "data")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", NO_DISK, *arguments]
        return subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)

    control = run("preprocess", str(path), "--state", "control", "--out", "copies")
    assert control.returncode == 2
    assert "cannot be written" in control.stderr
    done = run("preprocess", model, "--state", "state", "--out", f"{bucket}/copies")
    assert done.returncode == 0, done.stderr
    updates = []
    for number in (1, 2, 3):
        update = synthetic(as_place(f"{bucket}/copies/copy-{number}", "test"), tmp_path / f"u{number}")
        updates.append(upload(update, f"{bucket}/u{number}"))
    done = run("postprocess", *updates, "--state", "state", "--out", f"{bucket}/final")
    assert done.returncode == 0, done.stderr
    assert not [file for file in scratch.rglob("*") if file.suffix == ".safetensors"]
    assert Checkpoint(as_place(f"{bucket}/final", "test")).tensors.keys() == Checkpoint(path).tensors.keys()


def test_errors_of_a_store_say_what_to_do(tmp_path: Path, bucket: str, monkeypatch, capsys) -> None:
    def said(*arguments: str) -> str:
        assert main(["preprocess", *arguments, "--state", str(tmp_path / "s"), "--out", f"{bucket}/c"]) == 2
        return capsys.readouterr().err

    assert "there is no such bucket" in said("s3://no-such-bucket/model")
    assert "expected a checkpoint directory, found no files there" in said(f"{bucket}/nothing")
    assert "expected a directory or one of s3://BUCKET/PREFIX" in said("ftp://host/model")
    assert "expected a directory or one of s3://BUCKET/PREFIX" in said("s3://bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "cannot be accessed" in said("s3://mpu/model")
