"""Runs that version 0.1.0 began and left: this version goes on with them.

tests/fixtures/runs-0.1.0.tar.xz holds a tiny model, four questions to forget and four to keep, a run of both parties in one
process (`local`), and one over a network (`network`: the server's folder, the client's, and the spool), each killed in round 2
of 2 when copy 1 was unlearned and copy 2 was not. They lay in /tmp/mpunlearn-0.1.0, which plans and records name.
"""

import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from mpunlearn import Perturbation, Training, run
from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, TensorDirectory, checkpoint_digest
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.network.worker import Worker
from mpunlearn.protocol.flower.courier.mail import Mail
from mpunlearn.protocol.flower.courier.spool import exchange
from mpunlearn.server.network.coordinator import Coordinator
from mpunlearn.server.plan import RunPlan
from mpunlearn.server.publisher import Publisher
from mpunlearn.server.state import ServerState
from mpunlearn.server.stream import row_slices
from mpunlearn.server.workspace import Workspace

ARCHIVE = Path(__file__).parent / "fixtures" / "runs-0.1.0.tar.xz"
WRITTEN_IN = "/tmp/mpunlearn-0.1.0"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The unpacked folder, with paths that are true here."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="tar")
    folder = tmp_path / "mpunlearn-0.1.0"
    for file in [*folder.rglob("plan.json"), *folder.rglob("round-0*.json")]:
        file.write_text(file.read_text().replace(WRITTEN_IN, str(folder)))
    return folder


class Before:
    """What the server's folder held when the run was killed, and what must come of it."""

    def __init__(self, server: Path, folder: Path) -> None:
        shutil.copytree(server / "state", folder / "state")
        shutil.copytree(server / "round-1", folder / "round-1")
        self.state, self.theta = ServerState(folder / "state"), Checkpoint(folder / "round-1")
        architecture = Architecture.of(self.theta)
        self.roles = architecture.tensor_roles(self.theta)
        self.publisher = Publisher(self.state.secret, self.state.rounds[-1], architecture)

    def check_copy(self, path: Path, copy: int) -> None:
        """A copy that is out is what this version would publish (up to the last bits of this processor's arithmetic)."""
        published = Checkpoint(path)
        for rows in row_slices(self.theta, self.roles):
            stored = self.theta.read_rows(rows.name, rows.start, rows.stop)
            mine = self.publisher.publish(rows, stored, Workspace(), [copy - 1]).rows[0]
            torch.testing.assert_close(published.read(rows.name), mine, rtol=1e-5, atol=1e-6)

    def check_final(self, final: Path, updates: list[TensorDirectory]) -> None:
        """θ of round 1 plus the weighted sum of the inverted updates, by the formula."""
        new = Checkpoint(final)
        for name, role in self.roles.items():
            result = self.theta.read(name).double()
            for maps, weight, update in zip(self.publisher.maps, self.publisher.design.weights, updates, strict=True):
                if name in update.tensors:
                    result += weight * maps.invert(role, update.read(name).double())
            torch.testing.assert_close(new.read(name).double(), result, rtol=1e-6, atol=1e-6)
        assert checkpoint_digest(final) != checkpoint_digest(self.theta.path)


def update_at(path: Path) -> TensorDirectory:
    return TensorDirectory(path, stem="update")


def test_a_run_in_one_process(old: Path, tmp_path: Path) -> None:
    out = old / "local"
    before = Before(out / "server", tmp_path)
    round_2 = out / "exchange" / "round-2"
    before.check_copy(round_2 / "copies" / "copy-2", 2)
    done = (round_2 / "updates" / "copy-1" / "update.safetensors").read_bytes()
    final = run(
        old / "model",
        forget=old / "forget.jsonl",
        retain=old / "retain.jsonl",
        out=out,
        rounds=2,
        keep_exchange=True,
        perturbation=Perturbation(copies=2, kappa=0.05),
        training=Training(objective="npo", epochs=1, batch_size=2, learning_rate=1e-3, max_length=128),
    )
    assert (round_2 / "updates" / "copy-1" / "update.safetensors").read_bytes() == done
    before.check_final(final, [update_at(round_2 / "updates" / f"copy-{copy}") for copy in (1, 2)])


def test_a_run_over_a_network(old: Path, tmp_path: Path) -> None:
    server, work, spool = (old / "network" / name for name in ("server", "work-0", "spool-0"))
    before = Before(server, tmp_path)
    before.check_copy(server / "exchange" / "round-2" / "copies" / "copy-2", 2)
    done = (work / "updates" / "round-2-copy-1" / "update.safetensors").read_bytes()
    files = {"forget": old / "forget.jsonl", "retain": old / "retain.jsonl"}
    coordinator, mail = Coordinator(RunPlan.read(server / "plan.json"), server), Mail(server / "mail")
    worker = Worker(spool, work, Policy.read(old / "policy.toml"), **files)
    for _ in range(30):
        if coordinator.step():
            break
        if (record := mail.load("1")) is not None:
            deliver = dict(zip(record["names"], record["jobs"], strict=True))
            worker.step()
            results, missing = exchange(spool, deliver, record["wanted"], 0.0)
            mail.unload("1", {"names": list(results), "results": list(results.values()), "missing": missing})
    assert (work / "updates" / "round-2-copy-1" / "update.safetensors").read_bytes() == done
    before.check_final(server / "final", [update_at(work / "updates" / f"round-2-copy-{copy}") for copy in (1, 2)])
