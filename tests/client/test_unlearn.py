"""One copy to one update, against a hand-written loop; and what must not change it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.cli import main
from mpunlearn.client import Client, Data, Resources, unlearn
from mpunlearn.client.batches import batches
from mpunlearn.client.objectives import OBJECTIVES
from mpunlearn.client.weights import select
from mpunlearn.errors import CheckpointError, DataError, PlanError
from mpunlearn.lm.examples import IGNORED, collate, encode
from mpunlearn.lm.losses import answer_nll
from mpunlearn.lm.model import load, nll
from mpunlearn.lm.records import read_records
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

    def nll(batch: dict) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return answer_nll(logits[:, :-1], batch["labels"][:, 1:])

    def mean(batch: dict) -> torch.Tensor:
        return nll(batch).sum() / (batch["labels"][:, 1:] != IGNORED).sum()

    with torch.no_grad():
        reference = nll(collate(forget_set, 2))
    model.train()
    for picks in plan:
        batch = collate([forget_set[pick.forget] for pick in picks], 2)
        if beta is None:
            loss = -mean(batch)
        else:
            difference = nll(batch) - reference[[pick.forget for pick in picks]]
            loss = -(2 / beta) * torch.nn.functional.logsigmoid(beta * difference).mean()
        if retain_set:
            loss = loss + mean(collate([retain_set[pick.retain] for pick in picks], 2))
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
        copies = preprocess(path, state=state, out=out, perturbation=Perturbation(kappa=0.0)).copies
        client = Client(forget=examples[0], retain=examples[1], training=training)
        updates = [client.unlearn(copy, tmp_path / f"u{optimizer}" / copy.name) for copy in copies]
        final = Checkpoint(postprocess(updates, state=state, out=tmp_path / f"o{optimizer}"))
        found = {name: final.read(name) - Checkpoint(path).read(name) for name in plain}
        apart[optimizer] = distance(plain, found)
    assert apart["tensor_adam"] < 1e-3
    assert apart["adamw_torch"] > 0.1


def read_all(path: Path) -> dict[str, torch.Tensor]:
    directory = TensorDirectory(path, stem="update")
    return {name: directory.read(name) for name in directory.tensors}


def with_options(**options) -> Training:
    return Training(**{**QUICK.__dict__, **options})


def update_of(path: Path, examples, out: Path, resources: Resources | None = None, **options) -> dict:
    """The update that training with those options gives."""
    if options.get("objective") == "rmu":
        options["parameters"] = {"layer": 0}
    data = Data(alternate_key="perturbed_answer")
    training, (forget, retain) = with_options(**options), examples
    return read_all(
        unlearn(path, forget=forget, retain=retain, out=out, training=training, data=data, resources=resources)
    )


def distance(one: dict, other: dict) -> float:
    """Relative Frobenius distance."""
    assert set(one) == set(other)
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (apart / sum(float(tensor.square().sum()) for tensor in one.values())) ** 0.5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_do_not_change_the_update(save_tiny, tmp_path: Path, examples, objective: str) -> None:
    """6 examples in steps of 4 and 2, whole and in passes of one example each.

    SGD, since Adam magnifies rounding where gradients vanish; those of UnDIAL and CE-U nearly do on a random model.
    """
    path = save_tiny()
    options = {"objective": objective, "optimizer": "sgd", "learning_rate": 0.1}
    whole = update_of(path, examples, tmp_path / "whole", **options)
    parts = update_of(path, examples, tmp_path / "parts", Resources(micro_batch_size=1), **options)
    assert distance(whole, parts) < (1e-3 if objective in ("undial", "ce-u") else 1e-5)
    control = update_of(path, examples, tmp_path / "control", **{**options, "batch_size": 3})
    assert distance(whole, control) > 1e-3


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("npo", ["--optimizer", "tensor_adam"]),
        ("grad-diff", ["--retain-loss", "kl"]),
        ("ngdiff", []),
        ("dpo", []),
        ("npo", ["--lora-rank", "2"]),
    ],
)
def test_two_processes_give_the_update_of_one(save_tiny, tmp_path: Path, examples, objective: str, options) -> None:
    path = save_tiny()
    command = ["-m", "mpunlearn.cli", "unlearn", path, "--objective", objective, *options]
    command += ["--forget", examples[0], "--retain", examples[1], "--batch-size", "4", "--epochs", "2"]
    command += ["--learning-rate", "1e-3", "--max-length", "64", "--micro-batch-size", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pair = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert main([str(part) for part in (*command[2:], "--out", tmp_path / "one")]) == 0
    line = [str(part) for part in (*pair, *command, "--out", tmp_path / "two")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert distance(read_all(tmp_path / "one"), read_all(tmp_path / "two")) < 1e-5
    assert {item.name for item in tmp_path.iterdir()} >= {"one", "two"}
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")]


def test_every_copy_sees_the_same_dropout(save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny(attention_dropout=0.3)
    one, other = (update_of(path, examples, tmp_path / name) for name in "ab")
    assert distance(one, other) == 0
    assert distance(one, update_of(save_tiny("calm"), examples, tmp_path / "c")) > 1e-2


def test_lora_trains_factors_of_the_selected_weights_and_sends_nothing_else(
    save_tiny, tmp_path: Path, examples
) -> None:
    path = save_tiny()
    update = update_of(path, examples, tmp_path / "u", lora_rank=2, lora_alpha=6.0, train=r"layers\.1\..*(q|up)_proj")
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
    original = Client._reference

    def frozen(client: Client, path: Path, card, kept, model):
        assert original(client, path, card, kept, model) is model
        return load(path)[0]

    monkeypatch.setattr(Client, "_reference", frozen)
    assert distance(switched, update_of(path, examples, tmp_path / "frozen", **options)) < 1e-5


def test_kl_holds_the_model_to_its_reference(save_tiny, tmp_path: Path, examples) -> None:
    """With the retain term alone nothing moves: the reference is the model itself. NLL, the control, does move."""
    path = save_tiny()
    options = {"objective": "grad-diff", "gamma": 0.0, "optimizer": "sgd", "learning_rate": 0.1}
    held = update_of(path, examples, tmp_path / "kl", **options, retain_loss="kl")
    assert max(float(tensor.abs().max()) for tensor in held.values()) < 1e-5
    learned = update_of(path, examples, tmp_path / "nll", **options)
    assert max(float(tensor.abs().max()) for tensor in learned.values()) > 1e-3


def test_an_interrupted_training_goes_on_from_its_checkpoint(save_tiny, tmp_path: Path, examples, monkeypatch) -> None:
    from mpunlearn.client import trainer

    path = save_tiny(attention_dropout=0.1)
    options = {"objective": "pdu", "epochs": 4, "parameters": {"dual_warmup": 1}}
    whole = update_of(path, examples, tmp_path / "whole", **options)
    steps: list[int] = []
    original = trainer._Trainer.training_step

    def dying(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if self.state.global_step == 5 and len(steps) < 8:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer._Trainer, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        update_of(path, examples, tmp_path / "cut", Resources(save_every=2), **options)
    assert not (tmp_path / "cut").exists()
    steps.clear()
    steps += [0] * 8
    resumed = update_of(path, examples, tmp_path / "cut", Resources(save_every=2), **options)
    assert steps[8] == 4
    assert distance(whole, resumed) == 0
    assert not list(tmp_path.glob(".cut*"))


def test_another_training_does_not_go_on_from_that_checkpoint(save_tiny, tmp_path: Path, examples, monkeypatch) -> None:
    from mpunlearn.client import trainer

    path = save_tiny()
    original = trainer._Trainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(trainer._Trainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            update_of(path, examples, tmp_path / "u", Resources(save_every=1))
    assert (tmp_path / ".u.training" / "checkpoint-3").is_dir()
    fresh = update_of(path, examples, tmp_path / "other", learning_rate=3e-3)
    assert distance(fresh, update_of(path, examples, tmp_path / "u", learning_rate=3e-3)) == 0


@pytest.mark.parametrize(("dtype", "coarse"), [("bfloat16", 1e-2), ("float16", 1e-3)])
def test_updates_can_travel_in_fewer_bits(save_tiny, tmp_path: Path, examples, dtype: str, coarse: float) -> None:
    path = save_tiny()
    exact = update_of(path, examples, tmp_path / "exact")
    small = update_of(path, examples, tmp_path / "small", update_dtype=dtype)
    assert {tensor.dtype for tensor in small.values()} == {getattr(torch, dtype)}
    assert 0 < distance(exact, {name: tensor.float() for name, tensor in small.items()}) < coarse


def test_losses_are_logged_where_asked(save_tiny, tmp_path: Path, examples) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    resources = Resources(report_to="tensorboard", log_dir=str(tmp_path / "logs"))
    update_of(save_tiny(), examples, tmp_path / "u", resources)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/forget_loss", "train/retain_loss"} <= set(scalars)
    assert len(events.Scalars("train/forget_loss")) == 4
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_bfloat16_and_recomputed_activations_give_nearly_the_same_update(save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny()
    options = {"objective": "grad-diff", "optimizer": "sgd", "learning_rate": 0.1}
    exact = update_of(path, examples, tmp_path / "exact", **options)
    again = update_of(path, examples, tmp_path / "again", Resources(gradient_checkpointing=True), **options)
    assert distance(exact, again) < 1e-6
    rough = update_of(path, examples, tmp_path / "rough", Resources(precision="bfloat16"), **options)
    assert 1e-5 < distance(exact, rough) < 0.2


def test_the_dual_variable_follows_the_retain_loss(save_tiny, tmp_path: Path, examples, monkeypatch) -> None:
    from mpunlearn.client import trainer

    seen: list[float] = []
    original = trainer._Dual.on_save

    def end(self, *args, **kwargs):
        seen.append(self._trainer.dual)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer._Dual, "on_save", end)
    path = save_tiny()
    for target, warmup in ((0.0, 0), (1e3, 0), (0.0, 9)):
        parameters = {"retain_target": target, "dual_step": 0.5, "dual_warmup": warmup}
        options = {"objective": "pdu", "parameters": parameters}
        update_of(path, examples, tmp_path / f"u{target}{warmup}", Resources(save_every=4), **options)
    unreachable, met, waiting = seen
    assert unreachable > 1.5
    assert met == 0
    assert waiting == 1


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
    with pytest.raises(DataError, match="which the --memory directory does not hold"):
        unlearn(second, out=tmp_path / "u3", **place)
    assert not (tmp_path / "u3").exists()


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
        ({"objective": "ngdiff", "alpha": 0.0}, PlanError, "needs both"),
        ({"objective": "rmu"}, PlanError, "--layer"),
        ({"objective": "rmu", "parameters": {"layer": -1}}, PlanError, "--layer"),
        ({"retain_loss": "hidden"}, PlanError, "only rmu"),
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


def test_a_model_does_not_outlive_its_training(save_tiny, examples, tmp_path: Path, monkeypatch) -> None:
    import weakref

    from mpunlearn.lm import model as models

    loaded: list[weakref.ref] = []
    load_model = models.load_model

    def remembering(path: Path):
        model = load_model(path)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "load_model", remembering)
    unlearn(
        save_tiny(), forget=examples[0], out=tmp_path / "update", training=Training(objective="grad-ascent", epochs=1)
    )
    assert len(loaded) == 1
    assert loaded[0]() is None
