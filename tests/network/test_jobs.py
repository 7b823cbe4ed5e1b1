"""Open jobs, and where their copies are: what survives a restart, a move to another node, and an answer that was refused."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.network.federation import Net, net_of

from mpunlearn.protocol.messages import Sealed
from mpunlearn.server.network import publication as publication_module
from mpunlearn.server.network.jobs import MAX_ATTEMPTS, Jobs
from mpunlearn.server.network.publication import Publication

CLIENT, OTHER = "c" * 64, "d" * 64
RUN = "0" * 32


@pytest.fixture
def make(world, tmp_path: Path) -> Callable[..., tuple[Net, Jobs]]:
    """A run whose round 1 is published, and its jobs, as they are after a restart."""

    def jobs(name: str = "net", store: Path | None = None) -> tuple[Net, Jobs]:
        options = {"federation": {"store": str(store)}} if store else {}
        net = net_of(tmp_path / name, world, **options)
        net.coordinator.step()
        folder = net.coordinator.folder
        publication = Publication(folder, net.store, net.training)
        return net, Jobs(folder, net.plan(), net.coordinator.identity, publication, net.store)

    return jobs


def outbox(net: Net, node: str) -> set[str]:
    return {file.name for file in net.coordinator.folder.outbox(node).glob("*")}


def test_a_job_is_given_once_and_stays_the_same_after_a_restart(make) -> None:
    net, jobs = make()
    for _ in range(2):
        jobs.give(RUN, 1, CLIENT, 2, None)
    (name,) = jobs.open
    assert outbox(net, "1") == set()
    jobs.give(RUN, 1, CLIENT, 2, "1")
    assert outbox(net, "1") == {name}
    job = Sealed.open((net.coordinator.folder.outbox("1") / name).read_bytes(), net.coordinator.identity.public).message
    assert (job.client, job.round, job.copy, job.copies, job.attempt) == (CLIENT, 1, 2, 2, 1)
    _, again = make()
    again.load(1)
    assert {name: out.job for name, out in again.open.items()} == {name: job}
    again.give(RUN, 1, CLIENT, 2, "7")  # the client came back with another node
    assert outbox(net, "7") == {name}


def test_withdrawn_jobs_are_nowhere(make) -> None:
    net, jobs = make()
    for client in (CLIENT, OTHER):
        for copy in (1, 2):
            jobs.give(RUN, 1, client, copy, "1")
    jobs.withdraw_all(CLIENT)
    assert {out.job.client for out in jobs.open.values()} == {OTHER}
    assert outbox(net, "1") == set(jobs.open)
    jobs.withdraw_all()
    assert not jobs.open
    assert not outbox(net, "1")
    jobs.load(1)
    assert not jobs.open


def test_an_accepted_update_closes_its_job_after_a_restart(make) -> None:
    net, jobs = make()
    for copy in (1, 2):
        jobs.give(RUN, 1, CLIENT, copy, "1")
    net.coordinator.folder.update(1, CLIENT, 1).mkdir(parents=True)
    _, again = make()
    again.load(1)
    assert [out.job.copy for out in again.open.values()] == [2]
    assert outbox(net, "1") == set(again.open)


def test_a_refused_answer_is_asked_for_again_under_another_name_but_not_forever(make) -> None:
    _, jobs = make()
    jobs.give(RUN, 1, CLIENT, 1, None)
    names = set()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        ((name, out),) = jobs.open.items()
        assert out.job.attempt == attempt
        names.add(name)
        assert jobs.ask_again(name) is (attempt < MAX_ATTEMPTS)
    assert not jobs.open
    assert len(names) == MAX_ATTEMPTS


def test_with_a_store_every_attempt_has_slots_of_its_own(make, tmp_path: Path) -> None:
    _, jobs = make(store=tmp_path / "store")
    jobs.give(RUN, 1, CLIENT, 1, None)
    ((name, first),) = jobs.open.items()
    assert all(file.url is not None for file in first.job.files)
    jobs.ask_again(name)
    ((_, second),) = jobs.open.items()
    assert len(first.job.slots) >= 4
    assert not set(first.job.slots) & set(second.job.slots)


def test_copies_are_published_once_and_again_when_their_urls_expire(world, tmp_path: Path, monkeypatch) -> None:
    net = net_of(tmp_path / "net", world, federation={"store": str(tmp_path / "store")})
    net.coordinator.step()
    folder = net.coordinator.folder
    publication = Publication(folder, net.store, net.training)
    shutil.rmtree(tmp_path / "store")
    assert publication.publish(1, RUN) == 0
    assert not publication.expired(1)
    assert not (tmp_path / "store").exists()
    begun = publication.begun(1)
    later = time.time() + net.store.signature_seconds
    monkeypatch.setattr(publication_module.time, "time", lambda: later)
    assert publication.expired(1)
    assert publication.publish(1, RUN) == 2
    assert not publication.expired(1)
    assert publication.begun(1) == begun  # nobody gets more time
    assert len([file for file in (tmp_path / "store").rglob("*") if file.is_file()]) == sum(
        len(os.listdir(copy)) for copy in folder.copies(1).iterdir()
    )
    publication.remove(1, RUN)
    assert not [file for file in (tmp_path / "store").rglob("*") if file.is_file()]
