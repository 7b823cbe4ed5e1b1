"""What the model is: pinned by a person, by a base, or by the first copy."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.client import planted
from tests.network.federation import Net
from tests.network.forgery import Scene, answer, given, hand_over, job_with

from mpunlearn.client.network.bounds import PlanBounds
from mpunlearn.client.network.pins import ModelPolicy, Pins, check_against_base, use_tokenizer_of
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.network.review import review
from mpunlearn.client.plausibility.report import Limits
from mpunlearn.errors import PlanError
from mpunlearn.lm.model import load_tokenizer
from mpunlearn.protocol.record.log import event_of


def copy_of(net: Net, number: int = 1) -> Path:
    return net.folder / "server/exchange/round-1/copies" / f"copy-{number}"


def with_policy(scene: Scene, folder: Path, **policy) -> Net:
    net = scene.net(folder)
    net.policy = policy
    net.workers = [net.start_worker(0)]
    return net


def change_template(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text((copy / "chat_template.jinja").read_text() + "{# another #}")


def change_tokenizer(copy: Path) -> None:
    file = copy / "tokenizer.json"
    file.write_text(file.read_text() + " ")


def change_config(copy: Path) -> None:
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_dropout": 0.9}))


CHANGES = {"template": change_template, "tokenizer": change_tokenizer, "settings": change_config}


@pytest.mark.parametrize("what", CHANGES)
def test_a_reviewed_copy_pins_the_model(what: str, scene: Scene, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    net = scene.net(tmp_path / "net")
    invitation = {"address": "127.0.0.1:9100", "server_key": net.coordinator.identity.public, "ca": None}
    (tmp_path / "invitation.json").write_text(json.dumps(invitation))
    report = review(copy_of(net), policy=file, invitation=tmp_path / "invitation.json", accept=True)
    assert report.failed == {}
    assert report.model["model_type"] == "llama"
    assert report.template in report.text()
    policy = Policy.read(file)
    assert policy.model == ModelPolicy(**vars(Pins.of(copy_of(net))))
    assert report.public_nll is not None
    assert policy.plausibility.public_nll == pytest.approx(report.public_nll + 1.5, abs=0.01)
    net.policy = {"model": policy.model, "plausibility": policy.plausibility}
    net.workers = [net.start_worker(0)]
    assert answer(net, hand_over(net, job_with(net))).refusal is None
    other = scene.net(tmp_path / "other")
    other.policy = net.policy
    other.workers = [other.start_worker(0)]
    CHANGES[what](copy_of(other))
    refusal = answer(other, given(other, copy_of(other))).refusal
    assert refusal == "the copy is not of the model that the client expects"
    assert any(f"not the model of the policy: {what} is" in line for line in other.said)


def test_without_a_review_the_first_copy_pins_the_model(scene: Scene, tmp_path: Path) -> None:
    net = scene.net(tmp_path / "net")
    assert answer(net, hand_over(net, job_with(net))).refusal is None
    assert any("no [model] in the policy" in line for line in net.said)
    ledger = net.folder / "work-0" / "copies.json"
    ledger.unlink()
    shutil.rmtree(net.folder / "work-0" / "updates")
    change_template(copy_of(net))
    assert answer(net, given(net, copy_of(net))).refusal == "the copy is not of the model that the client expects"


def test_a_policy_can_ask_for_a_review_before_anything_is_trained(scene: Scene, tmp_path: Path) -> None:
    net = with_policy(scene, tmp_path / "net", review=True)
    path = hand_over(net, job_with(net))
    assert not (net.spool(0) / "results" / path.name).exists()
    kept = net.folder / "work-0" / "review" / "round-1-copy-1"
    assert any(f"client review {kept} --policy POLICY --accept" in line for line in net.said)
    said = len(net.said)
    net.workers[0].step()
    assert len(net.said) == said
    model = ModelPolicy(**vars(Pins.of(kept)))
    net.policy = {"review": True, "model": model}
    net.workers = [net.start_worker(0)]
    net.workers[0].step()
    assert answer(net, path).refusal is None


def test_with_a_base_its_tokenizer_and_template_are_used(scene: Scene, tmp_path: Path) -> None:
    base = scene.net(tmp_path / "start").model
    net = with_policy(scene, tmp_path / "net", model=ModelPolicy(base=str(base)))
    (copy_of(net) / "chat_template.jinja").write_text("{{ messages[0]['content'] * 9 }}")  # never looked at
    assert answer(net, given(net, copy_of(net))).refusal is None
    other = with_policy(scene, tmp_path / "other", model=ModelPolicy(base=str(base)))
    change_tokenizer(copy_of(other))
    refusal = answer(other, given(other, copy_of(other))).refusal
    assert refusal == "the copy is not of the model that the client expects"
    assert any("the tokenizer's files differ from the base's" in line for line in other.said)


def test_with_a_base_the_copy_is_still_the_one_in_its_event(scene: Scene, tmp_path: Path) -> None:
    """The base's template takes the place of the copy's, but what the server signed is checked as it came."""
    base = shutil.copytree(scene.net(tmp_path / "start").model, tmp_path / "base")
    change_template(base)
    net = with_policy(scene, tmp_path / "net", model=ModelPolicy(base=str(base)))
    assert answer(net, given(net, copy_of(net), event=True)).refusal is None
    (update,) = (net.folder / "work-0" / "updates").iterdir()
    signed, published = event_of(update), event_of(copy_of(net))
    assert signed is not None
    assert published is not None
    assert signed.event.after == [published.id]


def test_a_base_of_other_shapes_or_settings_is_another_model(save_tiny, tmp_path: Path) -> None:
    base = save_tiny("base")
    assert check_against_base(save_tiny("same"), base) == []
    assert "has shape" in check_against_base(save_tiny("wider", intermediate_size=48), base)[0]
    assert "rms_norm_eps" in check_against_base(save_tiny("other", rms_norm_eps=0.5), base)[0]
    change_template(tmp_path / "same")
    use_tokenizer_of(base, tmp_path / "same")
    assert load_tokenizer(tmp_path / "same").chat_template == load_tokenizer(base).chat_template


def duplicate_neurons(copy: Path) -> None:
    found = load_file(copy / "model.safetensors")
    gate = found["model.layers.0.mlp.gate_proj.weight"]
    gate[20:] = gate[:20]
    save_file(found, copy / "model.safetensors", {"format": "pt"})


def tag(copy: Path) -> None:
    template = "{% for m in messages %}{% for c in m['content'] %}{{ c ~ loop.index }}{% endfor %}{% endfor %}"
    (copy / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(("plant", "check"), [(duplicate_neurons, "duplicates"), (tag, "verbatim")])
def test_a_planted_first_copy_is_refused_and_does_not_pin_itself(
    plant, check: str, scene: Scene, tmp_path: Path
) -> None:
    net = scene.net(tmp_path / "net")
    plant(copy_of(net))
    assert answer(net, given(net, copy_of(net))).refusal == f"the copy is not plausible: {check}"
    work = net.folder / "work-0"
    assert not (work / "model.json").exists()
    assert not list(work.glob("updates/*"))
    off = scene.net(tmp_path / "off")
    off.policy = {"plausibility": Limits(duplicates=1.0, verbatim=False)}
    off.workers = [off.start_worker(0)]
    plant(copy_of(off))
    assert answer(off, given(off, copy_of(off))).refusal is None


def test_a_planted_copy_is_shown_and_not_accepted(tmp_path: Path) -> None:
    copy = planted.traps(tmp_path / "copy", "fuses")
    report = review(copy)
    assert "NOT PLAUSIBLE" in report.text()
    (tmp_path / "policy.toml").write_text(f'server_key = "{"ab" * 32}"\n')
    with pytest.raises(PlanError, match="--accept: the copy is not plausible"):
        review(copy, policy=tmp_path / "policy.toml", accept=True)
    assert "[model]" not in (tmp_path / "policy.toml").read_text()


def test_options_that_contradict_each_other(save_tiny, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--accept: needs --policy"):
        review(save_tiny(), accept=True)
    with pytest.raises(PlanError, match="does not exist; give --invitation"):
        review(tmp_path / "model", policy=tmp_path / "none.toml", accept=True)
    with pytest.raises(PlanError, match="nowhere is not a directory; expected one, or hub:ORG/MODEL"):
        review(tmp_path / "model", base="nowhere")


def test_too_few_steps_are_refused_without_saying_how_many_texts_there_are(scene: Scene, tmp_path: Path) -> None:
    net = with_policy(scene, tmp_path / "net", plan=PlanBounds())
    assert answer(net, hand_over(net, job_with(net))).refusal == "the plan cannot be followed with this client's text"
    assert any("1 epochs of 4 texts in batches of 4 are 1 steps; min steps is 8" in line for line in net.said)
