"""One copy to one update, against a hand-written loop."""

import json
from pathlib import Path

import pytest
import torch

from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.client import unlearn
from mpunlearn.client.dataset import batches, collate, encode, read_records
from mpunlearn.client.objectives import answer_nll, cross_entropy
from mpunlearn.client.trainer import load
from mpunlearn.client.unlearn import select
from mpunlearn.errors import CheckpointError, DataError, PlanError
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.plan import Training
from mpunlearn.server import Perturbation, postprocess, preprocess

QUICK = Training(objective="npo", epochs=2, batch_size=4, learning_rate=1e-3, max_length=64)


def hand_written(path: Path, forget: Path, retain: Path | None, training: Training, beta: float | None) -> dict:
    """AdamW on γ·L_forget + α·L_retain in twenty lines, over all the transformer layers' weights."""
    model, tokenizer = load(path)
    select(model, "blocks")
    forget_set = encode(read_records(forget), tokenizer, 64)
    retain_set = encode(read_records(retain), tokenizer, 64) if retain else []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=training.learning_rate, weight_decay=0.0)
    plan = batches(len(forget_set), len(retain_set), batch_size=4, epochs=2, seed=0, round_number=1)

    def forward(batch: dict) -> torch.Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    with torch.no_grad():
        whole = collate(forget_set, 2)
        reference = answer_nll(forward(whole), whole["labels"])
    model.train()
    for pairs in plan:
        batch = collate([forget_set[f] for f, _ in pairs], 2)
        nll = answer_nll(forward(batch), batch["labels"])
        if beta is None:
            loss = -cross_entropy(forward(batch), batch["labels"])
        else:
            difference = nll - reference[[f for f, _ in pairs]]
            loss = -(2 / beta) * torch.nn.functional.logsigmoid(beta * difference).mean()
        if retain_set:
            kept = collate([retain_set[r] for _, r in pairs], 2)
            loss = loss + cross_entropy(forward(kept), kept["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in trained.items()}


@pytest.mark.parametrize(("objective", "beta"), [("grad-ascent", None), ("grad-diff", None), ("npo", 0.1)])
def test_the_update_is_that_of_a_hand_written_loop(save_tiny, tmp_path: Path, examples, objective: str, beta) -> None:
    path, (forget, retain) = save_tiny(), examples
    training = Training(**{**QUICK.__dict__, "objective": objective})
    out = unlearn(path, forget=forget, retain=retain, out=tmp_path / "u", training=training)
    update = TensorDirectory(out, stem="update")
    expected = hand_written(path, forget, retain if objective != "grad-ascent" else None, training, beta)
    assert set(update.tensors) == set(expected)
    for name, tensor in expected.items():
        assert float((update.read(name) - tensor).abs().max()) < 2e-5, name
        assert float(tensor.abs().max()) > 1e-4, name


def test_copies_without_noise_give_equal_updates_once_inverted(save_tiny, tmp_path: Path, examples) -> None:
    """Same batches in the same order: three copies that differ by permutations alone train alike under AdamW."""
    path, (forget, retain) = save_tiny(), examples
    finals = []
    for copies, strength in ((1, "none"), (3, "full")):
        name = f"{copies}"
        perturbation = Perturbation(copies=copies, kappa=0.0, reparameterization=strength)
        place = {"state": tmp_path / f"s{name}", "out": tmp_path / f"c{name}"}
        published = preprocess(path, **place, perturbation=perturbation).copies
        training = Training(**{**QUICK.__dict__, "train": r"mlp\."})
        updates = [
            unlearn(copy, forget=forget, retain=retain, out=tmp_path / f"u{name}" / copy.name, training=training)
            for copy in published
        ]
        finals.append(Checkpoint(postprocess(updates, state=tmp_path / f"s{name}", out=tmp_path / f"o{name}")))
    moved = 0.0
    for name in finals[0].tensors:
        assert float((finals[0].read(name) - finals[1].read(name)).abs().max()) < 5e-5, name
        moved = max(moved, float((finals[0].read(name) - Checkpoint(path).read(name)).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize(
    ("train", "expected"),
    [("all", "everything"), ("blocks", r"\.layers\."), (r"layers\.1\.mlp", r"layers\.1\.mlp")],
)
def test_only_trained_tensors_are_in_the_update(save_tiny, tmp_path: Path, examples, train: str, expected: str) -> None:
    import re

    path = save_tiny(tie_word_embeddings=True)
    training = Training(**{**QUICK.__dict__, "train": train})
    out = unlearn(path, forget=examples[0], retain=examples[1], out=tmp_path / "u", training=training)
    names = set(Checkpoint(path).tensors)
    wanted = names if expected == "everything" else {name for name in names if re.search(expected, name)}
    assert set(TensorDirectory(out, stem="update").tensors) == wanted
    assert {info.dtype for info in TensorDirectory(out, stem="update").tensors.values()} == {torch.float32}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_neox", "phi3"])
def test_families_that_transformers_holds_otherwise_are_updated_under_their_names_on_disk(
    save_tiny, tmp_path: Path, examples, model_type: str
) -> None:
    sizes = {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2} if "moe" in model_type else {}
    sizes |= {"num_key_value_heads": 4} if model_type == "gpt_neox" else {}
    path = save_tiny(model_type=model_type, **sizes)
    copies = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=Perturbation(kappa=0.01)).copies
    updates = [
        unlearn(copy, forget=examples[0], retain=examples[1], out=tmp_path / "u" / copy.name, training=QUICK)
        for copy in copies
    ]
    for copy, update in zip(copies, updates, strict=True):
        names = set(TensorDirectory(update, stem="update").tensors)
        assert names == {name for name in Checkpoint(copy).tensors if ".layers." in name}
    new = Checkpoint(postprocess(updates, state=tmp_path / "s", out=tmp_path / "o"))
    moved = {name for name in new.tensors if not torch.equal(new.read(name), Checkpoint(path).read(name))}
    assert moved == {name for name in new.tensors if ".layers." in name}


def as_round(copy: Path, number: int, out: Path) -> Path:
    """The same published copy, as if it were of another round."""
    import shutil

    shutil.copytree(copy, out)
    config = json.loads((out / "config.json").read_text())
    config["mpunlearn"]["round"] = number
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_the_reference_is_the_copy_of_round_one(save_tiny, tmp_path: Path, examples) -> None:
    forget, retain = examples
    copies = preprocess(save_tiny(), state=tmp_path / "s", out=tmp_path / "c").copies
    memory = tmp_path / "memory"
    unlearn(copies[1], forget=forget, retain=retain, out=tmp_path / "u1", memory=memory, training=QUICK)
    kept = json.loads((memory / "copy-2.json").read_text())
    model, tokenizer = load(copies[1])
    whole = collate(encode(read_records(forget), tokenizer, 64), 2)
    with torch.no_grad():
        logits = model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits
    assert kept["forget_nll"] == pytest.approx(answer_nll(logits, whole["labels"]).tolist(), rel=1e-5)
    # Round 2 takes what round 1 kept, and does not go on without it.
    second = as_round(copies[1], 2, tmp_path / "second")
    kept["forget_nll"] = [value + 3 for value in kept["forget_nll"]]
    out = unlearn(second, forget=forget, retain=retain, out=tmp_path / "u2", memory=memory, training=QUICK)
    (memory / "copy-2.json").write_text(json.dumps(kept))
    moved = unlearn(second, forget=forget, retain=retain, out=tmp_path / "u3", memory=memory, training=QUICK)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(*(TensorDirectory(path, stem="update").read(name) for path in (out, moved)))
    with pytest.raises(DataError, match="--memory"):
        unlearn(second, forget=forget, retain=retain, out=tmp_path / "u4", training=QUICK)
    with pytest.raises(DataError, match="another forget set"):
        unlearn(second, forget=retain, retain=retain, out=tmp_path / "u4", memory=memory, training=QUICK)
    assert not (tmp_path / "u4").exists()


def test_an_ordinary_checkpoint_gives_an_update_of_no_run(save_tiny, tmp_path: Path, examples) -> None:
    out = unlearn(save_tiny(), forget=examples[0], retain=examples[1], out=tmp_path / "u", training=QUICK)
    assert Card.of(json.loads((out / "update.json").read_text())) is None


def test_plain_text_with_no_retain_set(save_tiny, tmp_path: Path) -> None:
    text = tmp_path / "texts.jsonl"
    text.write_text(json.dumps({"text": "The Silent Harbour is in Lyon. " * 30}) + "\n")
    training = Training(objective="grad-ascent", epochs=1, max_length=32)
    out = unlearn(save_tiny(), forget=text, out=tmp_path / "u", training=training)
    assert TensorDirectory(out, stem="update").tensors


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"objective": "forget-me"}, PlanError, "expected one of grad-ascent, grad-diff, npo"),
        ({"objective": "grad-diff", "beta": 1.0}, PlanError, "--beta"),
        ({"beta": 0.0}, PlanError, "--beta"),
        ({"train": "no such parameter"}, PlanError, "--train"),
        ({"train": "("}, PlanError, "--train"),
        ({"scheduler": "zigzag"}, PlanError, "zigzag"),
    ],
)
def test_impossible_training(save_tiny, tmp_path: Path, examples, options, kind, message: str) -> None:
    with pytest.raises(kind, match=message):
        training = Training(**{**QUICK.__dict__, **options})
        unlearn(save_tiny(), forget=examples[0], retain=examples[1], out=tmp_path / "u", training=training)
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize(
    "option", ["epochs", "batch_size", "max_length", "learning_rate", "weight_decay", "gamma", "seed"]
)
def test_numbers_out_of_range(option: str) -> None:
    with pytest.raises(PlanError, match=f"--{option.replace('_', '-')}"):
        Training(**{option: -1})


def test_missing_inputs(save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny()
    with pytest.raises(DataError, match="--retain"):
        unlearn(path, forget=examples[0], out=tmp_path / "u", training=QUICK)
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        unlearn(path, forget=tmp_path / "missing.jsonl", retain=examples[1], out=tmp_path / "u", training=QUICK)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        unlearn(path, forget=examples[0], retain=examples[1], out=tmp_path / "u", training=QUICK)
    assert not (tmp_path / "u").exists()
