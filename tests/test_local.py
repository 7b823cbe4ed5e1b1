"""The whole run: equal to plain training where it must be, and indifferent to being killed."""

import hashlib
import json
import multiprocessing
import random
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.perturbations import without_offset

from mpunlearn.checkpoint import Checkpoint, checkpoint_digest
from mpunlearn.client.client import Client
from mpunlearn.client.unlearn import unlearn
from mpunlearn.errors import CheckpointError, DataError, FileError, PlanError, StateError
from mpunlearn.local import run
from mpunlearn.protocol.plan import Training
from mpunlearn.server.plan import RunPlan
from mpunlearn.server.state import ServerState, locked

QUICK = Training(objective="npo", epochs=1, batch_size=3, learning_rate=1e-3, max_length=64)


def test_one_noise_free_round_is_plain_unlearning(save_tiny, tmp_path: Path, examples) -> None:
    from mpunlearn.checkpoint import TensorDirectory

    path, (forget, retain) = save_tiny(), examples
    still = without_offset(copies=1, kappa=0.0, reparameterization="none")
    final = run(path, forget=forget, retain=retain, out=tmp_path / "r", rounds=1, perturbation=still, training=QUICK)
    update = TensorDirectory(
        unlearn(path, forget=forget, retain=retain, out=tmp_path / "u", training=QUICK), stem="update"
    )
    for name in Checkpoint(path).tensors:
        expected = Checkpoint(path).read(name)
        if name in update.tensors:
            expected = expected + update.read(name)
        assert torch.equal(Checkpoint(final).read(name), expected), name


def test_both_sides_are_apart_on_disk_and_little_is_left(save_tiny, tmp_path: Path, examples) -> None:
    path, (forget, retain) = save_tiny(dtype=torch.bfloat16), examples
    out = tmp_path / "r"
    options = {"forget": forget, "retain": retain, "out": out, "rounds": 3, "training": QUICK}
    final = run(path, perturbation=without_offset(copies=2), **options)
    assert sorted(p.name for p in out.iterdir()) == ["client", "exchange", "final", "server"]
    assert list((out / "exchange").iterdir()) == []
    assert sorted(p.name for p in (out / "server").iterdir()) == ["identity.key", "plan.json", "state"]
    kept = ["commitments.json", "identity.key", "memory", "plan.json", "record.json"]
    assert sorted(p.name for p in (out / "client").iterdir() if not p.name.endswith(".lock")) == kept
    assert all((out / side).stat().st_mode & 0o077 == 0 for side in ("server", "client", "final"))
    digest = hashlib.sha256(forget.read_bytes()).hexdigest().encode()
    assert not any(digest in file.read_bytes() for file in (out / "server").rglob("*") if file.is_file())
    assert {info.dtype for info in Checkpoint(final).tensors.values()} == {torch.bfloat16}
    assert [record.closed for record in ServerState(out / "server" / "state").rounds] == [True] * 3
    key = (out / "server" / "state" / "secret.key").read_bytes()
    questions = [json.loads(line)["question"].encode() for line in forget.read_text().splitlines()]
    for file in out.rglob("*"):
        if file.is_file() and file.name != "secret.key":
            content = file.read_bytes()
            assert key not in content, file
            assert not any(question in content for question in questions), file
    digest = checkpoint_digest(final)
    assert checkpoint_digest(run(path, perturbation=without_offset(copies=2), **options)) == digest
    with locked(out / "server"), pytest.raises(StateError, match="another process"):
        run(path, perturbation=without_offset(copies=2), **options)
    with pytest.raises(PlanError, match="--copies 2, not 3"):
        run(path, perturbation=without_offset(copies=3), **options)
    with pytest.raises(PlanError, match="--rounds 3, not 2"):
        run(path, perturbation=without_offset(copies=2), **{**options, "rounds": 2})
    forget.write_text(forget.read_text() + forget.read_text())
    with pytest.raises(PlanError, match="--forget with SHA-256 .*, not with SHA-256"):
        run(path, perturbation=without_offset(copies=2), **options)
    assert checkpoint_digest(final) == digest


def test_a_finished_run_goes_on_with_more_rounds(save_tiny, tmp_path: Path, examples) -> None:
    """To the same bytes as with so many rounds from the start, also if it is killed before the final model is moved."""
    path, (forget, retain) = save_tiny(), examples
    options = {"forget": forget, "retain": retain, "perturbation": without_offset(copies=2), "training": QUICK}
    done = run(path, out=tmp_path / "r", rounds=1, **options)
    assert checkpoint_digest(run(path, out=tmp_path / "r", rounds=1, **options)) == checkpoint_digest(done)
    longer = with_the_secret_of(tmp_path / "r", tmp_path / "longer")
    expected = checkpoint_digest(run(path, out=longer, rounds=3, **options))
    killed = Path(shutil.copytree(tmp_path / "r", tmp_path / "killed"))
    plan = RunPlan.read(killed / "server" / "plan.json")
    replace(plan, rounds=3).pin(killed / "server" / "plan.json", extend=True)
    for out in (tmp_path / "r", killed):
        with pytest.raises(PlanError, match="--eta 1.0, not 0.5.*--rounds [13], not 4"):
            run(path, out=out, rounds=4, eta=0.5, **options)
        assert checkpoint_digest(run(path, out=out, rounds=3, **options)) == expected
        assert {p.name for p in (out / "server").iterdir()} >= {"plan.json", "extended.json", "state"}
        assert not list((out / "server").glob("round-*"))
        assert len(ServerState(out / "server" / "state").rounds) == 3


def test_a_run_of_a_bfloat16_model_goes_on_from_its_rounded_result(save_tiny, tmp_path: Path, examples, caplog) -> None:
    path, (forget, retain) = save_tiny(dtype=torch.bfloat16), examples
    options = {"forget": forget, "retain": retain, "perturbation": without_offset(copies=2), "training": QUICK}
    done = checkpoint_digest(run(path, out=tmp_path / "r", rounds=1, **options))
    with caplog.at_level("INFO", logger="mpunlearn"):
        final = run(path, out=tmp_path / "r", rounds=2, **options)
    assert "going on after round 1 from the final model" in caplog.text
    assert checkpoint_digest(final) != done
    assert {info.dtype for info in Checkpoint(final).tensors.values()} == {torch.bfloat16}


def test_impossible_runs_write_nothing(save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny()
    with pytest.raises(PlanError, match="--rounds"):
        run(path, forget=examples[0], out=tmp_path / "r", rounds=0)
    with pytest.raises(PlanError, match="--objective"):
        run(path, forget=examples[0], out=tmp_path / "r", training=Training(objective="npoo"))
    with pytest.raises(DataError, match="no such file"):
        run(path, forget=tmp_path / "none.jsonl", retain=examples[1], out=tmp_path / "r")
    with pytest.raises(DataError, match="--retain"):
        run(path, forget=examples[0], out=tmp_path / "r")
    with pytest.raises(CheckpointError, match="nothing at that path"):
        run(tmp_path / "nowhere", forget=examples[0], retain=examples[1], out=tmp_path / "r")
    with pytest.raises(PlanError, match="--eta"):
        run(path, forget=examples[0], retain=examples[1], out=tmp_path / "r", eta=float("nan"))
    with pytest.raises(PlanError, match="save_pretrained"):
        run(torch.nn.Linear(1, 1), forget=examples[0], retain=examples[1], out=tmp_path / "r")  # type: ignore[arg-type]
    assert not (tmp_path / "r").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlanError, match="is a file"):
        run(path, forget=examples[0], retain=examples[1], out=tmp_path / "file")


def test_a_run_never_touches_what_it_did_not_write(save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny("work/final")
    before = checkpoint_digest(path)
    with pytest.raises(PlanError, match="contains the model"):
        run(path, forget=examples[0], retain=examples[1], out=tmp_path / "work", rounds=1)
    with pytest.raises(PlanError, match="do not belong to a run"):
        run(save_tiny("other"), forget=examples[0], retain=examples[1], out=tmp_path / "work", rounds=1)
    assert checkpoint_digest(path) == before
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["final"]


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    save_tiny, tmp_path: Path, examples, monkeypatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10**5, 10**5))
    with pytest.raises(FileError, match="free some space"):
        run(save_tiny(), forget=examples[0], retain=examples[1], out=tmp_path / "r", training=QUICK)
    assert not (tmp_path / "r").exists()


def test_no_more_than_the_copies_of_one_round_are_held(save_tiny, tmp_path: Path, examples, monkeypatch) -> None:
    held: list[int] = []
    original = Client.unlearn

    def watched(client: Client, copy: Path, out: Path) -> Path:
        held.append(len(list((tmp_path / "r" / "exchange").glob("round-*/copies/copy-*"))))
        return original(client, copy, out)

    monkeypatch.setattr(Client, "unlearn", watched)
    run(save_tiny(), forget=examples[0], retain=examples[1], out=tmp_path / "r", rounds=2, training=QUICK)
    assert held == [3, 2, 1] * 2


FAULTS = ("open", "close", "rename")
"""Where a process can die in the narrowest places: once a round is pinned, before it is closed, before a rename."""


def in_process(path: Path, forget: Path, retain: Path, out: Path, fault: str | None = None, count: int = 0) -> None:
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    left = [count]

    def die_at_the(original):
        def dying(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), 9)
            return original(*args, **kwargs)

        return dying

    if fault == "open":
        from mpunlearn.server import copies

        copies.Copies.write = die_at_the(copies.Copies.write)
    elif fault == "close":
        ServerState.close = die_at_the(ServerState.close)
    elif fault == "rename":
        Path.rename = die_at_the(Path.rename)
    run(path, forget=forget, retain=retain, out=out, rounds=3, perturbation=without_offset(kappa=0.05), training=QUICK)


@pytest.fixture(scope="module")
def context():
    """A server process that has the libraries loaded, so that kills fall into the run and not into imports."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["mpunlearn.local", "mpunlearn.client.trainer"])
    return found


@pytest.fixture
def undisturbed(context, save_tiny, tmp_path: Path, examples):
    """The inputs of a run, the state it ended with, its digest and its duration in seconds."""
    inputs = (save_tiny(max_shard_size="100KB"), *examples)
    for name in ("warm-up", "undisturbed"):
        begun = time.monotonic()
        process = context.Process(target=in_process, args=(*inputs, tmp_path / name))
        process.start()
        process.join()
        assert process.exitcode == 0
    duration = time.monotonic() - begun
    return inputs, tmp_path / "undisturbed", checkpoint_digest(tmp_path / "undisturbed" / "final"), duration


def with_the_secret_of(done: Path, out: Path) -> Path:
    """A directory for a run with the same secret as another: its state without the rounds."""
    shutil.copytree(done / "server" / "state", out / "server" / "state")
    for name in ("round-*.json", "record.json", "commitments.json"):
        for file in (out / "server" / "state").glob(name):
            file.unlink()
    (out / "server").chmod(0o700)
    return out


def assert_complete(out: Path, rounds: int, copies: int) -> None:
    """The record of a run verifies, and no event is lost or doubled."""
    from mpunlearn.protocol.record.verification import verify

    found = verify([out])
    assert found.problems == []
    assert found.bundle.absent == []
    kinds = Counter(event.event.kind for event in found.bundle.events)
    assert kinds == {"published": rounds * copies, "updated": rounds * copies, "aggregated": rounds}


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_with_the_same_bytes(context, undisturbed, tmp_path: Path) -> None:
    inputs, done, expected, duration = undisturbed
    chance, kills, runs = random.Random(11), 0, 0
    while kills < 12:
        runs += 1
        out = with_the_secret_of(done, tmp_path / f"killed-{runs}")
        while True:
            process = context.Process(target=in_process, args=(*inputs, out))
            process.start()
            process.join(timeout=chance.uniform(0.05, 0.8) * duration if kills < 12 else None)
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
        assert checkpoint_digest(out / "final") == expected
        assert_complete(out, rounds=3, copies=3)
        assert sorted(p.name for p in out.iterdir()) == ["client", "exchange", "final", "server"]
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_killed_in_the_narrowest_places_ends_with_the_same_bytes(context, undisturbed, tmp_path, fault) -> None:
    inputs, done, expected, _ = undisturbed
    for count in range(2 if fault != "rename" else 4):
        out = with_the_secret_of(done, tmp_path / f"{fault}-{count}")
        process = context.Process(target=in_process, args=(*inputs, out, fault, count))
        process.start()
        process.join()
        assert process.exitcode == -9
        process = context.Process(target=in_process, args=(*inputs, out))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert checkpoint_digest(out / "final") == expected
        assert_complete(out, rounds=3, copies=3)


@pytest.mark.slow
def test_a_run_killed_while_its_state_is_made_goes_on(context, save_tiny, tmp_path: Path, examples) -> None:
    inputs = (save_tiny(), *examples)
    for count in range(4):
        out = tmp_path / f"new-{count}"
        for fault in ("rename", None):
            process = context.Process(target=in_process, args=(*inputs, out, fault, count))
            process.start()
            process.join()
        assert process.exitcode == 0
        assert (out / "final" / "config.json").is_file()
