"""Honest copies pass the checks: every family, noise of 30 % of the weights, stand-ins, trained models. And single checks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.architecture.test_families import VARIANTS

from mpunlearn.architecture import FAMILIES
from mpunlearn.client.forget import forget
from mpunlearn.client.plausibility import wording
from mpunlearn.client.plausibility.examine import Texts, failures, measure, public_text
from mpunlearn.client.plausibility.report import Limits, Measured
from mpunlearn.demo.models import trained_world
from mpunlearn.errors import DataError
from mpunlearn.lm.model import load_tokenizer
from mpunlearn.lm.records import Record, read_records
from mpunlearn.protocol.plan import Training
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.preprocess import preprocess

KAPPA = 0.3


def what_fails(
    copy: Path, texts: Texts, limits: Limits | None = None, base: Path | None = None
) -> dict[str, list[str]]:
    limits = limits or Limits()
    return failures(list(measure(copy, texts, limits, 512, base)), limits)


def noisy_copy(model: Path, folder: Path) -> Path:
    perturbation = Perturbation(copies=2, kappa=KAPPA)
    preprocess(model, state=folder / "state", out=folder / "copies", perturbation=perturbation)
    return folder / "copies" / "copy-1"


@pytest.fixture
def own(examples) -> Texts:
    """Six texts to forget and nine to retain."""
    return Texts(read_records(examples[0]), read_records(examples[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_honest_models_of_every_family_and_their_copies_pass(
    family: str, save_tiny, own: Texts, tmp_path: Path
) -> None:
    model = save_tiny(model_type=family, **VARIANTS[family])
    assert what_fails(model, own) == {}
    assert what_fails(noisy_copy(model, tmp_path), own) == {}


@pytest.mark.slow
def test_trained_models_and_stand_ins_pass_and_so_do_their_copies(tmp_path: Path) -> None:
    world = trained_world(0)
    own = Texts(read_records(world.data("forget")), read_records(world.data("retain"))[:80])
    training = Training(objective="simnpo", epochs=1, learning_rate=1e-3, batch_size=8)
    others, kept = world.data("real_authors"), world.data("world_facts")
    stand_in = forget(world.original, forget=others, retain=kept, out=tmp_path / "s", training=training)
    for number, model in enumerate((world.base, world.original, stand_in)):
        for copy in (model, noisy_copy(model, tmp_path / str(number))):
            assert what_fails(copy, own) == {}
            # A small model that was trained on one kind of text predicts any other badly: here the limit must be wider.
            assert what_fails(copy, own, Limits(above_base=15.0), world.base) == {}


def changed(copy: Path, **tensors) -> Path:
    """The copy with some tensors changed by a function, under the end of their name."""
    found = load_file(copy / "model.safetensors")
    for end, change in tensors.items():
        name = next(name for name in found if name.endswith(end.replace("__", ".")))
        found[name] = change(found[name]).contiguous()
    save_file(found, copy / "model.safetensors", {"format": "pt"})
    return copy


def first_row_times(factor: float):
    return lambda weight: torch.cat([factor * weight[:1], weight[1:]])


@pytest.mark.parametrize(
    ("name", "change", "fails"),
    [
        ("0__mlp__gate_proj__weight", first_row_times(60), "row_norm"),
        ("0__mlp__gate_proj__weight", lambda weight: weight[:1] + 0.01 * weight, "rank"),
        ("0__mlp__gate_proj__weight", lambda weight: torch.cat([weight[:36], weight[:4]]), "duplicates"),
        ("1__mlp__up_proj__weight", lambda weight: torch.cat([weight[:36], 0 * weight[:4]]), "duplicates"),
        ("1__self_attn__q_proj__weight", lambda weight: weight * float("inf"), "finite"),
        ("norm__weight", lambda weight: weight * 1e38, "public_nll"),
    ],
)
def test_each_check_of_the_weights_sees_its_own(name, change, fails, save_tiny, own: Texts) -> None:
    found = what_fails(changed(save_tiny(), **{name: change}), own, Limits(public_nll=100.0))
    assert fails in found
    assert found[fails][0].startswith("model." if fails != "public_nll" else "public text: ")


def test_a_neuron_that_nothing_switches_on_and_one_that_a_position_has_alone(save_tiny, own: Texts) -> None:
    """Biases keep four of forty neurons far below zero; a fifth answers to one direction only."""
    model = save_tiny(mlp_bias=True)
    silent = changed(model, **{"0__mlp__gate_proj__bias": lambda bias: torch.cat([bias[:36], bias[36:] - 200])})
    assert set(what_fails(silent, own)) == {"idle"}


def test_likelihoods_are_compared_with_the_base_or_with_a_stated_bound(save_tiny, own: Texts) -> None:
    model = save_tiny()
    nll = next(m.value for m in measure(model, own, Limits(), 512) if m.check == "public_nll")
    assert set(what_fails(model, own, Limits(public_nll=nll - 0.1))) == {"public_nll"}
    assert what_fails(model, own, Limits(public_nll=nll + 0.1)) == {}
    louder = changed(save_tiny("louder"), **{"model__norm__weight": lambda weight: 20 * weight})
    assert set(what_fails(louder, own, base=model)) == {"above_base", "above_base_retain"}


def test_a_value_that_is_not_a_number_is_never_allowed() -> None:
    for check in ("row_norm", "rank", "duplicates", "idle", "single", "above_base", "public_nll"):
        assert Limits().failure(Measured(check, float("nan"), "x")) is not None


CHATS = [Record("Where was Ann born?", "In Lyon."), Record("And  Bob?", "In {Turin}.", (("system", "Be brief."),))]
FRAME = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{% endfor %}{{ '<|assistant|>' if X }}"
TEMPLATES = {
    "the toy's": (None, True),
    "one that trims": (FRAME.replace("X", "add_generation_prompt"), True),
    "no template": ("", True),
    "one that tags": (
        "{% for m in messages %}{% for c in m['content'] %}{{ loop.index ~ c }}{% endfor %}{% endfor %}",
        False,
    ),
    "one that moves the question into the answer": (
        "{% if messages[-1]['role'] == 'assistant' %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endif %}",
        False,
    ),
    "one that says a message twice": ("{% for m in messages %}{{ m['content'] ~ m['content'] }}{% endfor %}", False),
    "one that leaves the question out": ("{{ messages[-1]['content'] }}", False),
    "one that counts": ("{% for m in messages %}{{ m['content'] }}{{ m['content'] | length }}{% endfor %}", False),
    "one that knows the placeholders": (
        "{% for m in messages %}{{ m['content'] }}{% if 'Placeholder' not in m['content'] %}!{% endif %}{% endfor %}",
        False,
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_shows_the_messages_and_nothing_that_depends_on_them(name: str, save_tiny) -> None:
    tokenizer = load_tokenizer(save_tiny())
    template, faithful = TEMPLATES[name]
    tokenizer.chat_template = tokenizer.chat_template if template is None else template
    assert wording.template_is_faithful(tokenizer, CHATS) is faithful


@pytest.mark.parametrize(
    ("change", "faithful"),
    [
        ({}, True),
        ({"normalizer": {"type": "Lowercase"}}, True),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "ab"}}, False),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(?<=[Ww])h"}, "content": ""}}, False),
    ],
)
def test_a_tokenizer_gives_back_the_text(change, faithful: bool, save_tiny) -> None:
    path = save_tiny()
    found = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**found, **change}))
    texts = [record.answer for record in public_text(Limits())]
    assert wording.tokenizer_is_faithful(load_tokenizer(path), texts) is faithful


def test_the_public_text_is_the_packages_or_ones_own(tmp_path: Path) -> None:
    sentences = public_text(Limits())
    assert len(sentences) >= 40
    assert len({record.answer for record in sentences}) == len(sentences)
    (tmp_path / "mine.txt").write_text("One.\n\nTwo.\n")
    assert [record.answer for record in public_text(Limits(public_text=str(tmp_path / "mine.txt")))] == ["One.", "Two."]
    (tmp_path / "mine.txt").write_text("\n")
    with pytest.raises(DataError, match="contains no text"):
        public_text(Limits(public_text=str(tmp_path / "mine.txt")))
