"""The client's audit: a planted leak is found, and nothing is found where nothing is."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.client.training import with_options
from tests.conftest import tiny_model

from mpunlearn import Client, Perturbation, preprocess
from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.cli import main
from mpunlearn.client.audit.audit import audit
from mpunlearn.client.audit.pooling import pooled
from mpunlearn.client.audit.report import NEEDS, ClientAudit, CopyScores, LayerSpelling
from mpunlearn.client.audit.subject import Subject
from mpunlearn.demo import models
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import AuditError, DataError, DisclosureWarning, PlanError, UpdateError

WIDE = {"hidden_size": 128, "intermediate_size": 256}


class World:
    """A random model, texts to forget and to retain, and texts that are not trained on."""

    def __init__(self, folder: Path, forget: int = 10) -> None:
        rows = generate_rows(0, Recipe())
        self.folder, self.model = folder, folder / "model"
        tokenizer = models.tokenizer_of(rows, Recipe())
        sizes = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 2, **WIDE}
        models.save(tiny_model("llama", torch.float32, **sizes), tokenizer, self.model)
        self.files: dict[str, Path] = {}
        parts = {
            "forget": rows["forget"][:forget],
            "near": rows["forget"][30:],
            "retain": rows["retain"][:forget],
            "reference": rows["retain"][40:140],
            "unrelated": rows["retain"][140:180],
        }
        for name, part in parts.items():
            self.files[name] = folder / f"{name}.jsonl"
            self.files[name].write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")

    def update(self, out: str, copy: Path | None = None, **options: Any) -> Path:
        client = Client(forget=self.files["forget"], retain=self.files["retain"], training=with_options(**options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DisclosureWarning)
            return client.unlearn(copy or self.model, self.folder / out)

    def audit(self, update: Path, *names: str, **options: Any) -> ClientAudit:
        texts = {name: self.files[name] for name in ("forget", "retain", *names)}
        return audit([update], copy=[self.model], **{**texts, **options})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def update(world: World) -> Path:
    """What the defaults lead to."""
    return world.update("update")


def test_members_are_told_from_other_texts(world: World, update: Path) -> None:
    report = world.audit(update, "reference", "near")
    values = report.metrics()
    assert values["floor-auc"] > 0.95
    assert values["membership-auc"] > 0.95
    assert values["membership-near-auc"] > 0.9
    assert values["retain-auc"] > 0.9
    assert report.texts == {"forget": 10, "retain": 10, "reference": 100, "near": 10}


def test_texts_that_were_not_trained_on_are_not(world: World, update: Path) -> None:
    """40 unrelated texts instead of the forget set: the AUC of guessing varies by 0.05."""
    values = world.audit(update, "reference", forget=world.files["unrelated"]).metrics()
    for name in ("floor-auc", "membership-auc", "cosine-auc"):
        assert abs(values[name] - 0.5) < 0.15, name
    assert values["membership-tpr"] < 0.1
    assert values["next-token-tpr"] < 0.2


def test_noise_in_place_of_an_update_says_nothing(world: World, update: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = load_file(update / "update.safetensors")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "update.json").write_bytes((update / "update.json").read_bytes())
    noise = {name: 1e-4 * torch.randn_like(value) for name, value in tensors.items()}
    save_file(noise, tmp_path / "noise" / "update.safetensors")
    values = world.audit(tmp_path / "noise", "reference").metrics()
    assert abs(values["membership-auc"] - 0.5) < 0.25
    assert values["tokens-auc"] < 0.65
    assert values["spelling"] == 0
    assert values["next-token-tpr"] < 0.1


def test_token_local_weights_name_the_tokens(world: World, update: Path) -> None:
    leaks = world.audit(world.update("local", token_local=True), "reference").tokens
    assert leaks["layer 0, attention (token-local)"].auc > 0.95
    assert leaks["layer 0, attention (token-local)"].precision > 0.75
    left = world.audit(update, "reference").tokens
    assert not [label for label in left if "token-local" in label or label == "layer 0, attention"]
    assert max(leak.auc for leak in left.values()) < 0.8


def test_rows_of_an_embedding_name_the_tokens(world: World) -> None:
    leaks = world.audit(world.update("all", train="all"), "reference").tokens
    assert leaks["embedding"].auc > 0.98
    assert leaks["LM head"].auc > 0.6


def test_a_frozen_inner_factor_of_lora_names_and_spells_nothing(world: World) -> None:
    values = world.audit(world.update("lora", lora_rank=4, learning_rate=1e-2), "reference").metrics()
    assert values["floor-auc"] > 0.9  # it did unlearn
    assert values["tokens-auc"] < 0.65
    assert values["next-token-tpr"] < 0.1


def test_one_step_of_sgd_on_few_texts_spells_them_out(tmp_path: Path) -> None:
    few = World(tmp_path, forget=2)
    found = {}
    for name, options in {"sgd": {"optimizer": "sgd", "learning_rate": 0.1}, "adam": {}}.items():
        report = few.audit(few.update(name, epochs=1, **options), "reference")
        found[name] = report.metrics()["spelling"]
        assert all(layer.control is not None and layer.control < 0.2 for layer in report.spelling)
        assert {layer.rank == layer.dimensions for layer in report.spelling} == {name == "adam"}
    with pytest.raises(AuditError, match="spelling is 0") as caught:
        few.audit(few.folder / "sgd", require="spelling<0.5")
    assert caught.value.exit_code == 3
    assert few.audit(few.folder / "adam", require="spelling<0.5").metrics()["spelling"] == 0
    assert found["sgd"] > 0.7
    assert found["adam"] == 0
    bfloat16 = few.audit(few.update("rounded", epochs=1, optimizer="sgd", learning_rate=0.1, update_dtype="bfloat16"))
    assert {layer.control for layer in bfloat16.spelling} == {None}
    assert bfloat16.metrics()["spelling"] < found["sgd"]


def test_copies_are_pooled_in_any_order(world: World, tmp_path: Path) -> None:
    perturbation = Perturbation(copies=3, kappa=0.05)
    copies = preprocess(world.model, state=tmp_path / "s", out=tmp_path / "c", perturbation=perturbation).copies
    updates = [world.update(str(tmp_path / f"u{number}"), copy, epochs=1) for number, copy in enumerate(copies)]
    texts = {"forget": world.files["forget"], "reference": world.files["reference"]}
    whole = audit(updates, copy=list(copies), **texts)
    assert whole.updates == 3
    assert audit(updates[::-1], copy=[copies[1], copies[0], copies[2]], **texts).metrics() == pytest.approx(
        whole.metrics()
    )
    other = world.update(str(tmp_path / "other"), copies[0], train=r"layers\.1")
    with pytest.raises(UpdateError, match="the updates change different weights"):
        audit([other, updates[1]], copy=list(copies[:2]), **texts)
    with pytest.raises(PlanError, match="none of the copies belongs to the update"):
        audit([updates[0]], copy=[copies[1]], **texts)
    with pytest.raises(PlanError, match="expected one copy for each of the 3 updates, found 2"):
        audit(updates, copy=list(copies[:2]), **texts)


def test_the_pool_separates_better_than_any_of_its_copies() -> None:
    """Scores with a signal of one standard deviation, and noise that is independent in every copy."""
    random = np.random.default_rng(0)

    def scores() -> CopyScores:
        values = {"forget": (random.normal(size=100) + 1).tolist(), "reference": random.normal(size=100).tolist()}
        tokens = {"embedding": [(random.normal(size=50) + 1).tolist(), random.normal(size=80).tolist()]}
        return CopyScores(values, values, values, tokens, [LayerSpelling("x", 3, 8, 0.5, 0.4, None)], "")

    copies = [scores() for _ in range(4)]
    pool, alone = pooled(copies), [pooled([copy]) for copy in copies]
    for name in ("membership-auc", "floor-auc", "tokens-auc", "tokens-precision"):
        assert pool.metrics()[name] > max(report.metrics()[name] for report in alone), name
    assert pool.spelling == [LayerSpelling("x", 3, 8, 0.5, 0.4, None)]


def test_a_trained_checkpoint_is_audited_like_its_update(world: World, update: Path, tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    for file in world.model.iterdir():
        (tmp_path / "trained" / file.name).write_bytes(file.read_bytes())
    trained = load_file(world.model / "model.safetensors")
    for name, value in load_file(update / "update.safetensors").items():
        trained[name] += value
    save_file(trained, tmp_path / "trained" / "model.safetensors", {"format": "pt"})
    values = world.audit(update, "reference").metrics()
    assert world.audit(tmp_path / "trained", "reference").metrics() == pytest.approx(values, abs=0.03)


FAMILIES = {
    "phi": {},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12, "tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "head_dim": 8},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_kind_of_family_is_audited(model_type: str, save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny(model_type=model_type, **FAMILIES[model_type])
    forget, retain = examples
    client = Client(forget=forget, retain=retain, training=with_options(token_local=True))
    with pytest.warns(DisclosureWarning):
        update = client.unlearn(path, tmp_path / "u")
    subject = Subject(path, update)
    named = {name for group in subject.groups for name in group.names}
    of_layers = {name for name in subject.names if ".layers." in name and len(subject.copy.tensors[name].shape) == 2}
    outputs = {name for name in of_layers if name.endswith(("o_proj.weight", "dense.weight"))}
    outputs |= {name for name in of_layers if name.endswith(("down_proj.weight", "fc2.weight", "4h_to_h.weight"))}
    local = {name for group in subject.groups if group.token_local for name in group.names}
    assert local == {name for name in of_layers if subject.architecture.token_local(subject.architecture.role_of(name))}
    assert named - local == {
        name for name in of_layers - outputs - local if ".mlp." not in name or "moe" not in model_type
    }
    after = subject.updated_model().state_dict()
    name = "attention.dense" if model_type == "gpt_neox" else "dense" if model_type == "phi" else "o_proj"
    (attended,) = [
        key for key in subject.names if f"layers.1.{'' if 'neox' in model_type else 'self_attn.'}{name}.weight" in key
    ]
    torch.testing.assert_close(after[attended], subject.copy.read(attended).float() + subject.delta(attended))
    report = audit([update], copy=[path], forget=forget, reference=retain)
    assert "layer 0, attention (token-local)" in report.tokens
    assert report.metrics()["floor-auc"] > 0.5


def test_requirements_on_the_command_line(world: World, update: Path, capsys) -> None:
    arguments = ["client", "audit", str(update), "--copy", str(world.model), "--forget", str(world.files["forget"])]
    arguments += ["--retain", str(world.files["retain"]), "--reference", str(world.files["reference"])]
    assert main([*arguments, "--require", "spelling<0.5,membership-auc>0.6", "--quiet"]) == 0
    assert "What the updates add: membership" in capsys.readouterr().out
    assert main([*arguments, "--require", "spelling<0.5,membership-auc<0.6", "--json", "--quiet"]) == 3
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["metrics"]["membership-auc"] > 0.9
    assert "--require membership-auc<0.6: not met: membership-auc is " in printed.err
    assert "spelling" not in printed.err
    assert main([*arguments, "--require", "membership<1"]) == 2
    assert all(name in capsys.readouterr().err for name in ("unknown: membership; known: floor-auc",))
    assert main([*arguments, "--require", "membership-near-auc<1"]) == 2
    assert "membership-near-auc needs texts to compare with; give near texts" in capsys.readouterr().err


def test_a_leak_of_tokens_does_not_meet_the_requirement(world: World) -> None:
    for options in ({"train": "all"}, {"token_local": True}):
        leaky = world.update(f"leaky {options}", **options)
        with pytest.raises(AuditError, match=r"tokens-auc<0.9: not met") as caught:
            world.audit(leaky, "reference", require="tokens-auc<0.9")
        assert caught.value.exit_code == 3
        assert caught.value.report.metrics()["tokens-auc"] > 0.95


def test_a_report_shows_every_value_that_can_be_limited(world: World, update: Path) -> None:
    report = world.audit(update, "reference", "near", decoys=world.files["unrelated"])
    assert set(report.metrics()) == set(NEEDS)
    assert set(report.to_json()["metrics"]) == set(NEEDS)
    text = report.text()
    assert text.index("any model that forgot") < text.index("the updates add")
    for value in ("membership-auc", "tokens-auc", "floor-near-auc", "cosine-decoy-auc", "retain-auc"):
        assert f"{report.metrics()[value]:.3f}" in text
    bare = world.audit(update)
    assert set(bare.metrics()) == {"tokens-auc", "tokens-precision", "spelling", "next-token-tpr"}
    assert "not measured" in bare.text()


def test_inputs_that_do_not_belong_together(world: World, update: Path, save_tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"forget\.jsonl: contains a text of the forget set; the near texts"):
        world.audit(update, near=world.files["forget"])
    other = save_tiny("other", hidden_size=32, num_hidden_layers=1)
    with pytest.raises(UpdateError, match=r"changes model\.layers\.1\..*, which .*other does not have"):
        audit([update], copy=[other], forget=world.files["forget"])
    with pytest.raises(PlanError, match="--max-length: expected at least 1"):
        world.audit(update, max_length=0)
    norms = world.update("norms", train="norm")
    with pytest.raises(UpdateError, match="changes no linear weight"):
        world.audit(norms)


def test_the_update_is_not_changed_by_looking_at_it(world: World, update: Path) -> None:
    before = {path.name: path.read_bytes() for path in update.iterdir()}
    world.audit(update, "reference")
    assert {path.name: path.read_bytes() for path in update.iterdir()} == before
    assert set(TensorDirectory(update, stem="update").tensors) < set(Checkpoint(world.model).tensors)
