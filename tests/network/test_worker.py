"""The client's worker: which messages it reads, which jobs it does, and what it tells the server when it does not."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.network.federation import Net
from tests.network.forgery import (
    TRAINING,
    Scene,
    answer,
    edited,
    given,
    half,
    hand_over,
    job_of,
    job_with,
    stranger,
    unchecked,
)

from mpunlearn.client.network.auditing import UpdateAudit
from mpunlearn.client.network.bounds import PlanBounds
from mpunlearn.client.network.policy import AuditPolicy
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import DataError, PlanError
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.messages import File, Job, Result, seal
from mpunlearn.protocol.record.log import Log, event_of

UNREADABLE: dict[str, tuple[Callable[[Net], bytes], str]] = {
    "a stranger's job": (lambda net: job_with(net, stranger()), "signed by"),
    "a path upwards": (
        lambda net: job_with(net, files=[File("../x.safetensors", 0, "0" * 64)]),
        "unexpected file name",
    ),
    "a pickle by name": (
        lambda net: job_with(net, files=[File("pytorch_model.bin", 0, "0" * 64)]),
        "unexpected file name",
    ),
    "code": (lambda net: job_with(net, files=[File("modeling.py", 0, "0" * 64)]), "unexpected file name"),
    "impossible numbers": (lambda net: job_with(net, copy=3), "invalid numbers"),
    "a result": (lambda net: seal(Result("0" * 32, "0" * 64, refusal="x"), net.coordinator.identity), "expected a job"),
    "noise": (lambda net: b"noise", "not a sealed message"),
    "half a character": (lambda net: edited(job_with(net), lambda body: None, half()), "not valid JSON"),
    "rounds without end": (
        lambda net: edited(job_with(net), lambda body: body.update(rounds=1 << 60), net.coordinator.identity),
        "at most",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_the_client_does_not_look_at(case: str, scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    make, why = UNREADABLE[case]
    path = hand_over(net, make(net))
    assert why in net.said[-1]
    assert not (net.spool(0) / "results" / path.name).exists()
    net.workers[0].step()
    assert sum(why in line for line in net.said) == 1  # said once


AGAINST_POLICY: dict[str, tuple[dict[str, Any], str]] = {
    "for another client": ({"client": "0" * 64}, "another client"),
    "too many copies": ({"copies": 9}, "max copies is 8"),
    "too many rounds": ({"rounds": 21}, "max rounds is 20"),
    "too many epochs": ({"training": {**TRAINING, "epochs": 21}}, "max epochs is 20"),
    "an objective": ({"training": {**TRAINING, "objective": "grad-ascent"}}, "objectives are simnpo"),
    "the embeddings": ({"training": {**TRAINING, "train": "all"}}, "train is blocks"),
    "token-local weights": (
        {"training": {**TRAINING, "token_local": True}},
        "token local is false",
    ),
    "a plan of a version that always trained those": (
        {"training": {name: value for name, value in TRAINING.items() if name != "token_local"}},
        "token local is false",
    ),
    "no plan": ({"training": {"shell": "rm"}}, "invalid training plan"),
    "a plan of wrong types": ({"training": {**TRAINING, "epochs": "many"}}, "invalid training plan"),
    "a plan with a list of parameters": ({"training": {**TRAINING, "parameters": [1]}}, "invalid training plan"),
    "a plan with a text as parameter": (
        {"training": {**TRAINING, "parameters": {"beta": "x"}}},
        "invalid training plan",
    ),
    "half an epoch": ({"training": {**TRAINING, "epochs": 1.5}}, "invalid training plan"),
    "a list of objectives": ({"training": {**TRAINING, "objective": ["simnpo"]}}, "invalid training plan"),
    "a rate without end": ({"training": {**TRAINING, "learning_rate": 10**400}}, "invalid training plan"),
    "a seed that no generator takes": ({"training": {**TRAINING, "seed": 1 << 40}}, "invalid training plan"),
    "a store": (
        {"slots": ["https://elsewhere.example/x?signature=1"]},
        "stores do not include https://elsewhere.example/x",
    ),
    "files of this machine": ({"slots": ["file:///root/.bashrc"]}, "stores do not include"),
    "out of an allowed store": ({"slots": ["file:///shared/mpu/../../root/.bashrc"]}, "stores do not include"),
    "out of an allowed store, encoded": (
        {"slots": ["https://store.example/mpu/%2E%2e/%2e%2e/private"]},
        "stores do not include",
    ),
    "beside an allowed store": ({"slots": ["file:///shared/mpu-other/x"]}, "stores do not include"),
    "a size": ({"files": [File("model.safetensors", 10**12, "0" * 64, url="file:///shared/mpu/x")]}, "max megabytes"),
}


@pytest.mark.parametrize("case", AGAINST_POLICY)
def test_the_policy_refuses(case: str, scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    net.policy = {"objectives": ["simnpo"], "stores": ["file:///shared/mpu", "https://store.example/mpu"]}
    net.workers = [net.start_worker(0)]
    changes, why = AGAINST_POLICY[case]
    path = hand_over(net, job_with(net, **changes))
    refusal = answer(net, path).refusal
    assert refusal is not None
    assert why in refusal
    assert "signature" not in refusal
    assert not (net.folder / "work-0" / "updates").exists()


def test_one_copy_under_one_number_and_one_run(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    path = hand_over(net, job_with(net))
    assert answer(net, path).refusal is None
    again = hand_over(net, job_with(net, nonce="again"))
    assert answer(net, again).files == answer(net, path).files  # the same update, not trained again
    _, other = job_of(net, copy=2)
    folder = net.folder / "server/exchange/round-1/copies/copy-2"
    files = [folder / file.name for file in other.files]
    swapped = unchecked(Job, **{**vars(other), "copy": 1})
    second = hand_over(net, seal(swapped, net.coordinator.identity, files))
    assert "was another copy before" in str(answer(net, second).refusal)
    for change in ({"rounds": 2}, {"copies": 3}, {"training": {**TRAINING, "epochs": 2}}):
        changed = hand_over(net, job_with(net, **change))
        assert answer(net, changed).refusal == "the plan differs from the first job's"
    elsewhere = hand_over(net, job_with(net, run="0" * 32))
    assert answer(net, elsewhere).refusal == (
        "this client takes part in another run; for this one it needs another --work"
    )


def test_a_copy_that_is_not_what_the_server_signed_is_not_trained_on(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    data = job_with(net)
    path = hand_over(net, data[:-1] + bytes([data[-1] ^ 1]))
    assert "damaged or incomplete" in net.said[-1]
    assert not (net.spool(0) / "results" / path.name).exists()
    assert not (net.folder / "work-0" / "updates").exists()
    assert not list((net.folder / "work-0" / "copies").glob("*"))


def test_a_link_in_the_spool_is_not_followed(scene: Scene, tmp_path: Path) -> None:
    from mpunlearn.errors import StateError

    net = scene.net(tmp_path / "net")
    data = job_with(net)
    (tmp_path / "job").write_bytes(data)
    name = hashlib.sha256(data).hexdigest()
    for old in (net.spool(0) / "jobs").iterdir():
        old.unlink()
    (net.spool(0) / "jobs" / name).symlink_to(tmp_path / "job")
    net.workers[0].step()
    assert net.said[-1].startswith("refused")
    another = job_with(net, nonce="another")
    shutil.rmtree(net.spool(0) / "results")
    (net.spool(0) / "results").symlink_to(tmp_path)
    with pytest.raises(StateError, match="tampered"):
        hand_over(net, another)


def test_what_else_stands_in_the_spool_stops_nothing(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    data = job_with(net)
    name = hashlib.sha256(data).hexdigest()
    (net.spool(0) / "results" / f".{name}.partial").mkdir()
    (net.spool(0) / "jobs" / ("f" * 64)).mkdir()
    (net.spool(0) / "jobs" / "notes.txt").write_text("x")
    path = net.spool(0) / "jobs" / name
    path.write_bytes(data)
    net.workers[0].step()
    assert answer(net, path).refusal is None
    shutil.rmtree(net.spool(0) / "results")
    net.workers[0].step()
    assert answer(net, path).refusal is None  # made anew


def test_a_copy_whose_config_makes_no_sense_is_refused(scene: Scene, tmp_path: Path) -> None:
    for number, change in enumerate(
        ({"num_attention_heads": "x"}, {"hidden_size": 10**9}, {"model_type": "x"}, {"rms_norm_eps": "x"})
    ):
        net = scene.net(tmp_path / str(number))
        folder = net.folder / "server/exchange/round-1/copies/copy-1"
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        assert "copy" in str(answer(net, given(net, folder)).refusal), change
        assert not (net.folder / "work-0" / "updates" / "round-1-copy-1").exists()


@pytest.mark.parametrize(
    "change", [{"_attn_implementation": "somebody/kernel"}, {"attn_implementation": {"": "somebody/kernel"}}]
)
def test_a_copy_that_names_code_of_the_hub_is_not_loaded(change, scene: Scene, tmp_path: Path, monkeypatch) -> None:
    import transformers

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    net = scene.net(tmp_path / "net")
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert answer(net, given(net, folder)).refusal == "transformers cannot load the copy"
    assert any("requests external code" in line for line in net.said)


def test_a_copy_that_breaks_whoever_looks_at_it_is_refused(scene: Scene, tmp_path: Path) -> None:
    """The copy's tokenizer gives ids that its model does not have."""
    net = scene.net(tmp_path / "net")
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 3}))
    found = load_file(folder / "model.safetensors")
    cut = {key: value[:3] if value.shape[0] == config["vocab_size"] else value for key, value in found.items()}
    save_file({key: value.contiguous() for key, value in cut.items()}, folder / "model.safetensors")
    assert answer(net, given(net, folder)).refusal == "the copy cannot be examined"
    assert "Traceback" in (net.folder / "work-0" / "error.txt").read_text()
    assert not (net.folder / "work-0" / "updates" / "round-1-copy-1").exists()


def test_an_old_job_is_not_done_again(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    data = job_with(net, rounds=5)
    assert answer(net, hand_over(net, data)).refusal is None
    kept = net.folder / "work-0" / "copies.json"
    ledger = json.loads(kept.read_text())
    ledger["copies"]["round-4-copy-1"] = {"copy": "0" * 64}
    kept.write_text(json.dumps(ledger))
    current = net.folder / "work-0" / "updates" / "round-4-copy-1"
    current.mkdir()
    old = hand_over(net, job_with(net, rounds=5, nonce="again"))
    assert "round 1 is over" in str(answer(net, old).refusal)
    assert current.exists()


def test_a_refusal_says_nothing_of_the_text(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    net.policy = {"plan": PlanBounds(min_steps=1, max_skip_tokens=10_000)}
    net.workers = [net.start_worker(0)]
    path = hand_over(net, job_with(net, training={**TRAINING, "skip_tokens": 10_000}))
    assert answer(net, path).refusal == "the plan cannot be followed with this client's text"


def known(folder: Path) -> Path:
    """Texts that are not trained on."""
    file = folder / "known.jsonl"
    rows = generate_rows(0, Recipe())["retain"][40:80]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_an_update_that_fails_the_audit_is_not_sent(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    limits = ["retain-auc<0.6", "spelling<0.5", "next-token-tpr>0.9"]
    net.policy = {"audit": AuditPolicy(limits, reference=str(known(tmp_path)))}
    net.workers = [net.start_worker(0)]
    path = hand_over(net, job_with(net))
    assert answer(net, path).refusal == "the update fails the client's audit: retain-auc, next-token-tpr"
    assert answer(net, path).files == []
    assert any("round-1-copy-1: retain-auc is 1.000, the policy requires retain-auc<0.6" in line for line in net.said)
    work = net.folder / "work-0"
    assert sorted(file.name for file in (work / "audit").iterdir()) == ["round-1-copy-1.json", "round-1.json"]
    assert all(file.stat().st_mode & 0o077 == 0 for file in [work / "audit", *(work / "audit").iterdir()])
    # Asked again, it neither trains nor measures again.
    before = (work / "audit" / "round-1-copy-1.json").stat().st_mtime_ns
    again = hand_over(net, job_with(net, nonce="again"))
    assert "fails the client's audit" in str(answer(net, again).refusal)
    assert (work / "audit" / "round-1-copy-1.json").stat().st_mtime_ns == before
    assert sum(line.endswith(": unlearning") for line in net.said) == 1
    # A policy with other texts measures the same update again, and one that it meets lets it go.
    net.policy = {"audit": AuditPolicy(["membership-auc>0.6"], reference=str(known(tmp_path)), near=str(net.forget[0]))}
    with pytest.raises(DataError, match="the near texts must be others"):
        net.start_worker(0)
    net.policy = {"audit": AuditPolicy(["spelling<0.5"])}
    net.workers = [net.start_worker(0)]
    assert answer(net, hand_over(net, job_with(net, nonce="third"))).refusal is None
    assert sum(line.endswith(": unlearning") for line in net.said) == 1
    assert sum(line.endswith(": auditing the update") for line in net.said) == 2


def test_an_audit_without_the_texts_that_it_needs_is_refused_at_once(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    net.policy = {"audit": AuditPolicy(["membership-auc<0.6"])}
    with pytest.raises(PlanError, match="policy: audit: require: membership-auc needs texts .* reference texts"):
        net.start_worker(0)


def test_an_update_that_cannot_be_audited_is_not_sent(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    net.policy = {"audit": AuditPolicy(["spelling<0.5"]), "train": ["norm"]}
    net.workers = [net.start_worker(0)]
    path = hand_over(net, job_with(net, training={**TRAINING, "train": "norm"}))
    assert answer(net, path).refusal == "the update cannot be audited"


def test_an_audit_that_breaks_is_a_refusal(scene: Scene, tmp_path: Path, monkeypatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("broken")

    net = scene.net(tmp_path / "net")
    net.policy = {"audit": AuditPolicy(["spelling<0.5"])}
    net.workers = [net.start_worker(0)]
    monkeypatch.setattr(UpdateAudit, "measure", broken)
    assert answer(net, hand_over(net, job_with(net))).refusal == "the update cannot be audited"
    assert "ZeroDivisionError" in (net.folder / "work-0" / "error.txt").read_text()
    assert any(line.startswith("the update cannot be audited: ZeroDivisionError; see ") for line in net.said)


def test_decoys_are_unlearned_by_the_worker_too(scene: Scene, tmp_path: Path) -> None:
    updates = []
    for name, decoys in (("plain", None), ("hidden", known(tmp_path))):
        net = scene.net(tmp_path / name)
        net.decoys = decoys
        net.workers = [net.start_worker(0)]
        path = hand_over(net, job_with(net))
        assert answer(net, path).refusal is None
        updates.append(load_file(net.folder / "work-0/updates/round-1-copy-1/update.safetensors"))
    assert updates[0].keys() == updates[1].keys()
    assert not any(torch.equal(value, updates[1][name]) for name, value in updates[0].items())


def test_a_copy_that_is_not_the_one_in_its_event_is_refused(scene: Scene, tmp_path: Path) -> None:
    """The job's digests are right, but the event is about other files, or a stranger's."""
    net = scene.net(tmp_path / "changed")
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    assert answer(net, given(net, folder, event=True)).refusal == "the copy's event does not verify"
    net = scene.net(tmp_path / "stranger")
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    signed, stranger = event_of(folder), Identity.at(tmp_path / "stranger.key")
    assert signed is not None
    Log(tmp_path / "record.json", stranger, signed.event.run, stranger.public).attest(
        "published", folder, signed.event.content
    )
    assert answer(net, given(net, folder, event=True)).refusal == "the copy's event does not match the job"
    net = scene.net(tmp_path / "honest")
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    assert answer(net, given(net, folder, event=True)).refusal is None
