"""A run between parties in one process: the same result as by hand, whoever is killed and whoever does not answer."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.network.federation import TRAINING, Net, begun, net_of, until, weights

from mpunlearn import Training
from mpunlearn.checkpoint import checkpoint_digest
from mpunlearn.client.client import Client
from mpunlearn.client.network.process import Process
from mpunlearn.errors import NetworkError, PlanError
from mpunlearn.server.federation import Federation
from mpunlearn.server.network import roster
from mpunlearn.server.network.status import run_status
from mpunlearn.server.rounds import Rounds

QUIET = {"kappa": 0.0, "reparameterization": "none"}


def test_a_run_without_noise_is_unlearning_by_hand(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, rounds=1, copies=1, perturbation=QUIET)
    final = weights(net.run())
    Client(forget=world[1], retain=world[2], training=TRAINING).unlearn(world[0], tmp_path / "update")
    update, start = load_file(tmp_path / "update" / "update.safetensors"), weights(world[0])
    assert any(value.abs().max() > 1e-4 for value in update.values())
    for name, value in final.items():
        torch.testing.assert_close(value, start[name] + update.get(name, 0), rtol=0, atol=1e-7)


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


def in_the_same_process(process: Process, method: str, seconds: float, *arguments: str) -> Any:
    """`Process.call` without a process: whatever kills the client there kills all of it, as a kill of the parent does."""
    service = process.__dict__.setdefault("service", process._service(process._say))
    return getattr(service, method)(*arguments)


class KilledError(BaseException):
    """Stands for kill -9: what comes after it in the program does not happen."""


@pytest.mark.slow
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

    monkeypatch.setattr(Process, "call", in_the_same_process)
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
        points, limit[0] = points + 1, limit[0] + 6
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
    order = finals[2][1].coordinator.roster.clients
    share = (0.25, 0.75) if order[0] == finals[2][1].identity(0).public else (0.75, 0.25)
    for name, mixed in finals[2][0].items():
        torch.testing.assert_close(
            mixed, share[0] * finals[0][0][name] + share[1] * finals[1][0][name], rtol=0, atol=1e-6
        )
    assert any((finals[0][0][name] - finals[1][0][name]).abs().max() > 1e-4 for name in finals[0][0])


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
        done = json.loads((net.folder / f"work-{number}" / "copies.json").read_text())["copies"]
        assert len({name.split("-copy-")[1] for name in done}) == 1
        assert len(done) == 2
    with pytest.raises(PlanError, match="as many --clients as --copies"):
        net_of(tmp_path / "three", world, clients=3, federation={"assign": "one"})


@pytest.mark.slow
def test_a_client_that_does_not_answer_is_dropped_where_a_quorum_allows_it(world, tmp_path: Path) -> None:
    federation = {"deadline": 6.0, "quorum": 1}
    net = net_of(tmp_path / "net", world, clients=2, rounds=1, federation=federation, silent={1})
    until(net)
    silent = net.identity(1).public
    assert any(
        line.startswith(f"continuing without client {silent[:16]}: it did not answer for copy 1, 2")
        for line in net.said
    )
    alone = net_of(tmp_path / "alone", world, rounds=1)
    assert set(weights(net.final)) == set(weights(alone.run()))
    assert silent in net.coordinator.roster.dropped
    net.plan().pin(net.coordinator.folder.plan)
    assert "complete, round 1 of 1" in run_status(net.folder / "server").text()


@pytest.mark.slow
def test_a_client_that_does_not_answer_ends_the_round_and_is_named(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, clients=2, rounds=1, federation={"deadline": 6.0}, silent={1})
    with pytest.raises(
        NetworkError, match=f"client {net.identity(1).public[:16]} did not answer for copy 1, 2 of round 1"
    ):
        until(net)
    # Settled: it answers now, and the run goes on with what there is.
    net.silent = set()
    net.federation = Federation(clients=2)
    net.start_server()
    until(net)
    assert net.final.is_dir()


@pytest.mark.slow
def test_a_copy_is_never_left_out_of_a_clients_average(world, tmp_path: Path, monkeypatch) -> None:
    """One copy of two is answered: the client counts as not answering, in both."""
    net = net_of(tmp_path / "net", world, clients=2, rounds=1, federation={"deadline": 6.0, "quorum": 1})
    late = net.identity(1).public

    def tamper(node: str, name: str, data: bytes) -> bytes | None:
        open_job = net.coordinator.jobs.open.get(name)
        is_second = open_job is not None and open_job.job.client == late and open_job.job.copy == 2
        return None if is_second else data

    net.tamper = tamper
    aggregated: list[Path] = []
    aggregate = Rounds.aggregate

    def watched(rounds: Rounds, number: int, updates: Sequence[Path], sent: Sequence[tuple[int, Path]]) -> None:
        aggregated.extend(updates)
        aggregate(rounds, number, updates, sent)

    monkeypatch.setattr(Rounds, "aggregate", watched)
    until(net)
    assert [path.parent.name for path in aggregated] == [net.identity(0).public] * 2
    assert any(late[:16] in line and "update of copy 1" in line for line in net.said)


def test_status_says_how_far_a_run_is(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, clients=2, rounds=1)
    net.plan().pin(net.coordinator.folder.plan)
    assert run_status(net.folder / "server").text().startswith("not started; start it with")
    shown = set()
    while not net.turn():
        shown |= set(run_status(net.folder / "server").text().splitlines())
    assert any("waiting for clients, round 1 of 1" in line for line in shown)
    client = net.identity(0).public[:16]
    assert any(line.startswith(f"client {client}: connected, 0 of 2 updates") for line in shown)
    size = sum(file.stat().st_size for file in (world[0]).glob("*")) / 1e6
    assert any(line.startswith("copies: 2 of ") and abs(float(line.split()[3]) - size) < 0.2 for line in shown)
    assert "complete, round 1 of 1" in run_status(net.folder / "server").text()


def test_a_refusal_names_the_client_and_the_run_goes_on_when_it_is_settled(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, rounds=1, policy={"max_copies": 1})
    with pytest.raises(NetworkError, match=r"declined copy [12] of round 1: max copies is 1, asked for 2"):
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
    assert any("does not belong to this run" in line for line in net.said)
    assert not net.coordinator.jobs.open or all(
        out.job.client == "0" * 64 for out in net.coordinator.jobs.open.values()
    )
    assert not list((net.folder / "work-0").glob("copies/*"))


def test_a_node_that_comes_back_under_another_number_gets_its_jobs(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, rounds=1)
    while not net.coordinator.roster.nodes:
        net.carry()
        net.workers[0].step()
        net.carry()
        net.coordinator.step()
    assert list(net.coordinator.roster.nodes) == ["1"]
    (net.coordinator.folder.mail / "nodes" / "1").rename(net.coordinator.folder.mail / "nodes" / "77")
    load, unload = net.mail.load, net.mail.unload
    net.mail.load = lambda node: load("77")  # type: ignore[method-assign]
    net.mail.unload = lambda node, record: unload("77", record)  # type: ignore[method-assign]
    net.run()
    assert list(net.coordinator.roster.nodes) == ["77"]


@pytest.mark.slow
def test_late_clients_are_dropped_together_or_not_at_all(world, tmp_path: Path) -> None:
    net = net_of(tmp_path / "net", world, clients=3, rounds=1, federation={"deadline": 6.0, "quorum": 2}, silent={1, 2})
    late = [net.identity(number).public[:16] for number in (1, 2)]
    with pytest.raises(NetworkError) as caught:
        until(net)
    assert all(client in str(caught.value) for client in late)
    assert not net.coordinator.roster.dropped


def narrowed(net: Net, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a client send the factors of one weight only."""
    unlearn = Client.unlearn

    def narrow(client: Client, copy: Path, out: Path) -> Path:
        unlearn(client, copy, out)
        if net.folder / f"work-{number}" in out.parents:
            file = out / "update.safetensors"
            tensors = load_file(file)
            name = min(tensors).removesuffix(".lora_A")
            save_file({key: value for key, value in tensors.items() if key.startswith(name)}, file)
        return out

    monkeypatch.setattr(Client, "unlearn", narrow)


LORA = Training(objective="simnpo", epochs=1, batch_size=4, learning_rate=1e-3, lora_rank=2)


def test_the_plan_says_which_factors_a_client_must_send(world, tmp_path: Path, monkeypatch) -> None:
    net = net_of(tmp_path / "net", world, rounds=1, copies=1, training=LORA)  # of two, either may come first
    narrowed(net, 0, monkeypatch)
    with pytest.raises(NetworkError, match="results for copy 1 of round 1 that were rejected"):
        net.run()
    assert any("changes 1 tensors, but the plan trains 11" in line for line in net.said)


def test_the_first_client_does_not_decide_what_all_must_train(world, tmp_path: Path, monkeypatch) -> None:
    """Where the plan does not name the tensors: a client that differs from most is dropped, even if it came first."""
    from mpunlearn.server.network import results

    monkeypatch.setattr(results, "planned_tensors", lambda copy, training: None)  # as for an MoE model
    net = net_of(tmp_path / "net", world, clients=3, rounds=1, training=LORA, federation={"quorum": 2})
    narrowed(net, 0, monkeypatch)
    net.run()
    assert list(net.coordinator.roster.dropped) == [net.identity(0).public]


def test_clients_that_differ_lose_no_accepted_update_if_none_can_be_dropped(world, tmp_path: Path, monkeypatch) -> None:
    from mpunlearn.server.network import results

    monkeypatch.setattr(results, "planned_tensors", lambda copy, training: None)  # as for an MoE model
    net = net_of(tmp_path / "net", world, clients=2, rounds=1, training=LORA)
    narrowed(net, 0, monkeypatch)
    for _ in range(2):
        with pytest.raises(NetworkError, match="trained different tensors"):
            net.run()
        accepted = [net.coordinator.folder.update(1, net.identity(number).public, 1) for number in range(2)]
        assert all(update.is_dir() for update in accepted)
        net.start_server()


def test_a_node_whose_first_answer_was_damaged_is_asked_again(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(roster, "RETRY_SECONDS", 0.0)
    net = net_of(tmp_path / "net", world, rounds=1)
    damaged: list[str] = []

    def tamper(node: str, name: str, data: bytes) -> bytes:
        damaged.append(name)
        return data if len(damaged) > 1 else b"noise"

    net.tamper = tamper
    net.run()
    assert any(line.startswith("rejected") for line in net.said)
