"""The whole run: equal to plain training where it must be, and indifferent to being killed."""

import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from mpunlearn.checkpoint import Checkpoint, checkpoint_digest
from mpunlearn.client import unlearn
from mpunlearn.errors import DataError, PlanError
from mpunlearn.protocol.local import run
from mpunlearn.protocol.plan import Training
from mpunlearn.server import Perturbation, ServerState

QUICK = Training(objective="npo", epochs=1, batch_size=3, learning_rate=1e-3, max_length=64)


def test_one_noise_free_round_is_plain_unlearning(save_tiny, tmp_path: Path, examples) -> None:
    from mpunlearn.checkpoint import TensorDirectory

    path, (forget, retain) = save_tiny(), examples
    still = Perturbation(copies=1, kappa=0.0, reparameterization="none")
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
    final = run(path, perturbation=Perturbation(copies=2), **options)
    assert sorted(p.name for p in out.iterdir()) == ["client", "exchange", "final", "server"]
    assert list((out / "exchange").iterdir()) == []
    assert sorted(p.name for p in (out / "server").iterdir()) == ["plan.json", "state"]
    assert (out / "server").stat().st_mode & 0o077 == 0
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
    assert checkpoint_digest(run(path, perturbation=Perturbation(copies=2), **options)) == digest
    with pytest.raises(PlanError, match="another perturbation"):
        run(path, perturbation=Perturbation(copies=3), **options)
    with pytest.raises(PlanError, match="another rounds"):
        run(path, perturbation=Perturbation(copies=2), **{**options, "rounds": 4})
    forget.write_text(forget.read_text() + forget.read_text())
    with pytest.raises(PlanError, match="another forget"):
        run(path, perturbation=Perturbation(copies=2), **options)
    assert checkpoint_digest(final) == digest


def test_impossible_runs_write_nothing(save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny()
    with pytest.raises(PlanError, match="--rounds"):
        run(path, forget=examples[0], out=tmp_path / "r", rounds=0)
    with pytest.raises(PlanError, match="--objective"):
        run(path, forget=examples[0], out=tmp_path / "r", training=Training(objective="no"))
    with pytest.raises(DataError, match="cannot be read"):
        run(path, forget=tmp_path / "none", out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def in_process(path: Path, forget: Path, retain: Path, out: Path) -> None:
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    run(path, forget=forget, retain=retain, out=out, rounds=3, perturbation=Perturbation(kappa=0.05), training=QUICK)


def test_a_run_killed_anywhere_ends_with_the_same_bytes(save_tiny, tmp_path: Path, examples) -> None:
    path, (forget, retain) = save_tiny(max_shard_size="100KB"), examples
    # A server process that has the libraries loaded, so that kills fall into the run and not into imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mpunlearn.protocol.local", "mpunlearn.client.trainer"])

    def start(out: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=in_process, args=(path, forget, retain, out))
        process.start()
        return process

    warm_up = start(tmp_path / "warm-up")
    warm_up.join()
    begun = time.monotonic()
    undisturbed = start(tmp_path / "undisturbed")
    undisturbed.join()
    duration = time.monotonic() - begun
    assert undisturbed.exitcode == 0
    expected = checkpoint_digest(tmp_path / "undisturbed" / "final")
    chance, kills, runs = random.Random(11), 0, 0
    while kills < 12:
        out = tmp_path / f"killed-{runs}"
        runs += 1
        # The same secret as the undisturbed run: its state without the rounds.
        state = out / "server" / "state"
        shutil.copytree(tmp_path / "undisturbed" / "server" / "state", state)
        for record in state.glob("round-*.json"):
            record.unlink()
        while True:
            process = start(out)
            process.join(timeout=chance.uniform(0.05, 0.8) * duration if kills < 12 else None)
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
        assert checkpoint_digest(out / "final") == expected
        assert sorted(p.name for p in out.iterdir()) == ["client", "exchange", "final", "server"]
        shutil.rmtree(out)
    assert kills >= 12
