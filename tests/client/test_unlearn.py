"""One copy to one update: which tensors it holds, in which form, and against which reference."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.client.training import QUICK, distance, read_all, update_of, with_options
from tests.perturbations import without_offset

from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.client import client as client_module
from mpunlearn.client.client import Client
from mpunlearn.client.trainer import Trainer
from mpunlearn.client.unlearn import unlearn
from mpunlearn.errors import CheckpointError, DataError, DisclosureWarning, PlanError
from mpunlearn.lm.examples import collate, encode
from mpunlearn.lm.losses import answer_nll
from mpunlearn.lm.model import load, nll
from mpunlearn.lm.records import read_records
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.plan import Training
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess


def test_copies_without_noise_give_equal_updates_once_inverted(save_tiny, tmp_path: Path, examples) -> None:
    """Same batches in the same order: three copies that differ by permutations alone train alike under AdamW."""
    path, (forget, retain) = save_tiny(), examples
    finals = []
    for copies, strength in ((1, "none"), (3, "full")):
        name = f"{copies}"
        perturbation = without_offset(copies=copies, kappa=0.0, reparameterization=strength)
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


TOKEN_LOCAL = r"layers\.0\..*(q_proj|k_proj|v_proj|qkv_proj|query_key_value)\.weight"


@pytest.mark.parametrize(
    ("options", "expected", "warned"),
    [
        ({"train": "all"}, "", True),
        ({"train": "blocks"}, rf"^(?!.*{TOKEN_LOCAL}).*\.layers\.", False),
        ({"train": "blocks", "token_local": True}, r"\.layers\.", True),
        ({"train": r"layers\.1\.mlp"}, r"layers\.1\.mlp", False),
    ],
)
def test_only_trained_tensors_are_in_the_update(
    save_tiny, tmp_path: Path, examples, options, expected: str, warned: bool
) -> None:
    path = save_tiny(tie_word_embeddings=True)
    place = {"forget": examples[0], "retain": examples[1], "out": tmp_path / "u"}
    with pytest.warns(DisclosureWarning, match="names the tokens of your examples") if warned else nullcontext():
        out = unlearn(path, **place, training=with_options(**options))
    wanted = {name for name in Checkpoint(path).tensors if re.search(expected, name)}
    assert set(TensorDirectory(out, stem="update").tensors) == wanted
    assert {info.dtype for info in TensorDirectory(out, stem="update").tensors.values()} == {torch.float32}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_neox", "phi3"])
def test_families_that_transformers_holds_otherwise_are_updated_under_their_names_on_disk(
    save_tiny, tmp_path: Path, examples, model_type: str
) -> None:
    sizes = {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2} if "moe" in model_type else {}
    sizes |= {"num_key_value_heads": 4} if model_type == "gpt_neox" else {}
    path = save_tiny(model_type=model_type, **sizes)
    copies = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=without_offset(kappa=0.01)).copies
    updates = [
        unlearn(copy, forget=examples[0], retain=examples[1], out=tmp_path / "u" / copy.name, training=QUICK)
        for copy in copies
    ]
    for copy, update in zip(copies, updates, strict=True):
        names = set(TensorDirectory(update, stem="update").tensors)
        assert names == in_layers(Checkpoint(copy).tensors, parallel=model_type == "gpt_neox")
    new = Checkpoint(postprocess(updates, state=tmp_path / "s", out=tmp_path / "o"))
    moved = {name for name in new.tensors if not torch.equal(new.read(name), Checkpoint(path).read(name))}
    assert moved == in_layers(new.tensors, parallel=model_type == "gpt_neox")


def test_lora_factors_have_the_names_on_disk_too(save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny(model_type="gpt_neox", num_key_value_heads=4)  # transformers calls its head lm_head
    training = with_options(lora_rank=2, train="all")
    with pytest.warns(DisclosureWarning):
        out = unlearn(path, forget=examples[0], retain=examples[1], out=tmp_path / "u", training=training)
    names = {name.rsplit(".lora_", 1)[0] for name in TensorDirectory(out, stem="update").tensors}
    assert "embed_out.weight" in names
    assert names <= set(Checkpoint(path).tensors)


def in_layers(names, parallel: bool) -> set[str]:
    """The tensors of the transformer layers without their token-local weights."""
    first = r"layers\.0\.mlp\.\w+\.weight" if parallel else "nothing"
    return {name for name in names if ".layers." in name and not re.search(f"{TOKEN_LOCAL}|{first}", name)}


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen3_moe"])
def test_with_tensor_adam_no_change_of_basis_makes_a_difference(
    save_tiny, tmp_path: Path, examples, model_type
) -> None:
    """Rotations too: three copies in three bases give the plain update. AdamW, the control, does not."""
    sizes = {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2} if "moe" in model_type else {}
    path = save_tiny(model_type=model_type, **sizes)
    apart = {}
    for optimizer in ("tensor_adam", "adamw_torch"):
        training = with_options(optimizer=optimizer)
        plain = read_all(
            unlearn(path, forget=examples[0], retain=examples[1], out=tmp_path / f"p{optimizer}", training=training)
        )
        state, out = tmp_path / f"s{optimizer}", tmp_path / f"c{optimizer}"
        copies = preprocess(path, state=state, out=out, perturbation=without_offset(kappa=0.0)).copies
        client = Client(forget=examples[0], retain=examples[1], training=training)
        updates = [client.unlearn(copy, tmp_path / f"u{optimizer}" / copy.name) for copy in copies]
        final = Checkpoint(postprocess(updates, state=state, out=tmp_path / f"o{optimizer}"))
        found = {name: final.read(name) - Checkpoint(path).read(name) for name in plain}
        apart[optimizer] = distance(plain, found)
    assert apart["tensor_adam"] < 1e-3
    assert apart["adamw_torch"] > 0.1


def test_lora_trains_factors_of_the_selected_weights_and_sends_nothing_else(
    save_tiny, tmp_path: Path, examples
) -> None:
    path = save_tiny()
    options = {"lora_rank": 2, "lora_alpha": 6.0, "learning_rate": 3e-3, "train": r"layers\.1\..*(q|up)_proj"}
    update = update_of(path, examples, tmp_path / "u", **options)
    weights = ["model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    assert set(update) == {f"{weight}.lora_{factor}" for weight in weights for factor in "AB"}
    # Trained on the weights themselves, one step of SGD from B = 0 moves them along scale · B's gradient: the scale is in B.
    for weight in weights:
        outputs, inputs = Checkpoint(path).tensors[weight].shape
        assert update[f"{weight}.lora_A"].shape == (2, inputs)
        assert update[f"{weight}.lora_B"].shape == (outputs, 2)
    merged = load_file(path / "model.safetensors")
    for weight in weights:
        merged[weight] = merged[weight] + update[f"{weight}.lora_B"] @ update[f"{weight}.lora_A"]
    (tmp_path / "merged").mkdir()
    for file in path.iterdir():
        shutil.copy(file, tmp_path / "merged")
    save_file(merged, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    forgets = [mean_nll(folder, examples[0]) for folder in (path, tmp_path / "merged")]
    assert forgets[1] > forgets[0] + 0.1


def mean_nll(path: Path, file: Path) -> float:
    model, tokenizer = load(path)
    values = nll(model, encode(read_records(file), tokenizer, 64), 8, tokenizer)
    return sum(values) / len(values)


@pytest.mark.parametrize("objective", ["grad-diff", "undial"])
def test_with_lora_the_reference_is_the_base_under_the_switched_off_adapter(
    save_tiny, tmp_path: Path, examples, objective: str, monkeypatch
) -> None:
    """The same update as with a second, frozen model; and no second model is loaded."""
    path = save_tiny()
    options = {"objective": objective, "lora_rank": 2, "optimizer": "sgd", "learning_rate": 0.1}
    options |= {"retain_loss": "kl", "alpha": 1.0}
    switched = update_of(path, examples, tmp_path / "switched", **options)

    def with_a_second_model(model, *args, reference, **options):
        assert reference is model
        return Trainer(model, *args, reference=load(path)[0], **options)

    monkeypatch.setattr(client_module, "Trainer", with_a_second_model)
    assert distance(switched, update_of(path, examples, tmp_path / "frozen", **options)) < 1e-5


def test_kl_holds_the_model_to_its_reference(save_tiny, tmp_path: Path, examples) -> None:
    """With the retain term alone nothing moves: the reference is the model itself. NLL, the control, does move."""
    path = save_tiny()
    options = {"objective": "grad-diff", "gamma": 0.0, "optimizer": "sgd", "learning_rate": 0.1}
    held = update_of(path, examples, tmp_path / "kl", **options, retain_loss="kl")
    assert max(float(tensor.abs().max()) for tensor in held.values()) < 1e-5
    learned = update_of(path, examples, tmp_path / "nll", **options)
    assert max(float(tensor.abs().max()) for tensor in learned.values()) > 1e-3


@pytest.mark.parametrize(("dtype", "coarse"), [("bfloat16", 1e-2), ("float16", 1e-3)])
def test_updates_can_travel_in_fewer_bits(save_tiny, tmp_path: Path, examples, dtype: str, coarse: float) -> None:
    path = save_tiny()
    exact = update_of(path, examples, tmp_path / "exact")
    small = update_of(path, examples, tmp_path / "small", update_dtype=dtype)
    assert {tensor.dtype for tensor in small.values()} == {getattr(torch, dtype)}
    assert 0 < distance(exact, {name: tensor.float() for name, tensor in small.items()}) < coarse


def test_the_copy_of_round_one_is_kept_for_objectives_that_take_its_logits(save_tiny, tmp_path: Path, examples) -> None:
    copies = preprocess(save_tiny(), state=tmp_path / "s", out=tmp_path / "c").copies
    training = with_options(objective="undial")
    place = {"forget": examples[0], "memory": tmp_path / "memory", "training": training}
    unlearn(copies[0], out=tmp_path / "u1", **place)
    kept = Checkpoint(tmp_path / "memory" / "copy-1")
    assert all(torch.equal(kept.read(name), Checkpoint(copies[0]).read(name)) for name in kept.tensors)
    second = as_round(copies[1], 2, tmp_path / "second")
    config = json.loads((second / "config.json").read_text())
    config["mpunlearn"]["copy"] = 1
    (second / "config.json").write_text(json.dumps(config))
    unlearn(second, out=tmp_path / "u2", **place)
    shutil.rmtree(tmp_path / "memory" / "copy-1")
    with pytest.raises(DataError, match="which is not in the --memory directory"):
        unlearn(second, out=tmp_path / "u3", **place)
    assert not (tmp_path / "u3").exists()


def as_round(copy: Path, number: int, out: Path) -> Path:
    """The same published copy, as if it were of another round."""
    import shutil

    shutil.copytree(copy, out, ignore=shutil.ignore_patterns("event.json"))
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
    expected = answer_nll(logits[:, :-1], whole["labels"][:, 1:]).tolist()
    assert kept["forget_nll"] == pytest.approx(expected, rel=1e-5)
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
        ({"objective": "grad-diff", "parameters": {"beta": 1.0}}, PlanError, "--beta"),
        ({"parameters": {"beta": 0.0}}, PlanError, "--beta"),
        ({"objective": "simnpo", "parameters": {"delta": float("nan")}}, PlanError, "--delta"),
        ({"objective": "ngdiff", "alpha": 0.0}, PlanError, "needs a retain gradient"),
        ({"objective": "rmu"}, PlanError, "--layer"),
        ({"objective": "rmu", "parameters": {"layer": -1}}, PlanError, "--layer"),
        ({"retain_loss": "hidden"}, PlanError, "only available for --objective rmu"),
        ({"update_dtype": "int8"}, PlanError, "--update-dtype"),
        ({"lora_rank": 2, "train": "norm"}, PlanError, "linear layer"),
        ({"optimizer": "magic"}, PlanError, "magic"),
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
