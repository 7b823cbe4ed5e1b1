"""The verdict on a result, and what it leaves behind."""

from pathlib import Path

from tests.network.federation import Net
from tests.network.forgery import Scene, first, honest, job_of, result, tensors

from mpunlearn.protocol.messages import Sealed
from mpunlearn.server.network.jobs import Jobs
from mpunlearn.server.network.publication import Publication
from mpunlearn.server.network.results import MAX_REFUSAL, Accepted, Declined, Rejected, Results
from mpunlearn.server.rounds import Rounds


def results_of(net: Net) -> Results:
    folder, plan = net.coordinator.folder, net.plan()
    jobs = Jobs(folder, plan, net.coordinator.identity, Publication(folder, None, plan.training), None)
    jobs.load(1)
    return Results(folder, Rounds(plan, folder.path, folder.final), jobs, None)


def test_what_is_accepted_is_kept_and_what_is_not_leaves_nothing(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    client, (name, job) = net.identity(0).public, job_of(net)
    files = honest(net, tmp_path / "honest")
    results, kept = results_of(net), net.coordinator.folder.update(1, client, 1)
    poisoned = tensors(files, lambda update: update[first(update)].fill_(float("nan")))
    verdict = results.check(Sealed.open(result(net, poisoned)), client, 1)
    assert isinstance(verdict, Rejected)
    assert "NaN" in verdict.reason
    assert list(net.coordinator.folder.updates(1, client).glob("*")) == []
    assert results.check(Sealed.open(result(net, files)), client, 1) == Accepted(name, job)
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == files
    assert kept.stat().st_mode & 0o077 == 0


def test_only_the_client_of_an_open_job_is_heard(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    client, sealed = net.identity(0).public, Sealed.open(result(net, honest(net, tmp_path / "honest")))
    for given, number, why in (
        (None, 1, "does not relay messages for"),
        ("0" * 64, 1, "does not relay messages for"),
        (client, 2, "does not answer"),
    ):
        verdict = results_of(net).check(sealed, given, number)
        assert isinstance(verdict, Rejected)
        assert why in verdict.reason


def test_a_refusal_is_shortened_and_made_printable(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    sealed = Sealed.open(result(net, {}, refusal="\x1b[2J" + "no" * 1000))
    assert results_of(net).check(sealed, net.identity(0).public, 1) == Declined(
        job_of(net)[1], ("\\x1b[2J" + "no" * 1000)[: MAX_REFUSAL + 3]
    )
