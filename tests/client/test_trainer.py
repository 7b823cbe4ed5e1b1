"""The training loop against a hand-written one, and what must not change its result."""

from pathlib import Path

import pytest
import torch
from tests.client.training import QUICK, distance, update_of

from mpunlearn.checkpoint import TensorDirectory
from mpunlearn.client import client as client_module
from mpunlearn.client.batches import MicroBatches, optimizer_steps
from mpunlearn.client.combine import DualAscent
from mpunlearn.client.resources import Resources
from mpunlearn.client.unlearn import unlearn
from mpunlearn.client.weights import select
from mpunlearn.lm.examples import IGNORED, collate, encode
from mpunlearn.lm.losses import answer_nll
from mpunlearn.lm.model import load
from mpunlearn.lm.records import read_records
from mpunlearn.protocol.objectives import OBJECTIVES
from mpunlearn.protocol.plan import Training


def hand_written(path: Path, forget: Path, retain: Path | None, training: Training, beta: float | None) -> dict:
    """AdamW on γ·L_forget + α·L_retain in twenty lines, over all the transformer layers' weights."""
    model, tokenizer = load(path)
    select(model, "blocks")
    forget_set = encode(read_records(forget), tokenizer, 64)
    retain_set = encode(read_records(retain), tokenizer, 64) if retain else []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=training.learning_rate, weight_decay=0.0)
    steps = optimizer_steps(len(forget_set), len(retain_set), batch_size=4, epochs=2, seed=0, round_number=1)

    def nll(batch: dict) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return answer_nll(logits[:, :-1], batch["labels"][:, 1:])

    def mean(batch: dict) -> torch.Tensor:
        return nll(batch).sum() / (batch["labels"][:, 1:] != IGNORED).sum()

    with torch.no_grad():
        reference = nll(collate(forget_set, 2))
    model.train()
    for picks in steps:
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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_do_not_change_the_update(save_tiny, tmp_path: Path, examples, objective: str) -> None:
    """6 examples in steps of 4 and 2, whole and in passes of one example each.

    SGD, since Adam magnifies rounding where gradients vanish; those of UnDIAL, CE-U and JensUn nearly do on a random model.
    """
    path = save_tiny()
    options = {"objective": objective, "optimizer": "sgd", "learning_rate": 0.1}
    whole = update_of(path, examples, tmp_path / "whole", **options)
    parts = update_of(path, examples, tmp_path / "parts", Resources(micro_batch_size=1), **options)
    assert distance(whole, parts) < (1e-3 if objective in ("undial", "ce-u", "jensun") else 1e-5)
    control = update_of(path, examples, tmp_path / "control", **{**options, "batch_size": 3})
    assert distance(whole, control) > 1e-3


def test_every_copy_sees_the_same_dropout(save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny(attention_dropout=0.3)
    one, other = (update_of(path, examples, tmp_path / name) for name in "ab")
    assert distance(one, other) == 0
    assert distance(one, update_of(save_tiny("calm"), examples, tmp_path / "c")) > 1e-2


class Interrupted:
    """Ctrl-C at the beginning of an optimizer step, once; and which steps began."""

    def __init__(self, monkeypatch, at: int) -> None:
        self.steps: list[int] = []
        original, armed = MicroBatches.step, [True]

        def step(batches: MicroBatches, number: int) -> list:
            self.steps.append(number)
            if number == at and armed[0]:
                armed[0] = False
                raise KeyboardInterrupt
            return original(batches, number)

        monkeypatch.setattr(MicroBatches, "step", step)


def test_an_interrupted_training_goes_on_from_its_checkpoint(save_tiny, tmp_path: Path, examples, monkeypatch) -> None:
    path = save_tiny(attention_dropout=0.1)
    options = {"objective": "pdu", "epochs": 4, "parameters": {"dual_warmup": 1}}
    whole = update_of(path, examples, tmp_path / "whole", **options)
    interrupted = Interrupted(monkeypatch, at=5)
    with pytest.raises(KeyboardInterrupt):
        update_of(path, examples, tmp_path / "cut", Resources(save_every=2), **options)
    assert not (tmp_path / "cut").exists()
    interrupted.steps.clear()
    resumed = update_of(path, examples, tmp_path / "cut", Resources(save_every=2), **options)
    assert interrupted.steps[0] == 4
    assert distance(whole, resumed) == 0
    assert not list(tmp_path.glob(".cut*"))


def test_another_training_does_not_go_on_from_that_checkpoint(save_tiny, tmp_path: Path, examples, monkeypatch) -> None:
    path = save_tiny()
    with monkeypatch.context() as patched:
        Interrupted(patched, at=3)
        with pytest.raises(KeyboardInterrupt):
            update_of(path, examples, tmp_path / "u", Resources(save_every=1))
    assert [item.name for item in (tmp_path / ".u.training").glob("step-*")] == ["step-00000003"]
    fresh = update_of(path, examples, tmp_path / "other", learning_rate=3e-3)
    assert distance(fresh, update_of(path, examples, tmp_path / "u", learning_rate=3e-3)) == 0


@pytest.mark.parametrize("options", [{}, {"log_dir": "logs"}])
def test_losses_are_logged_in_runs_or_where_asked(save_tiny, tmp_path: Path, examples, monkeypatch, options) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    update_of(save_tiny(), examples, tmp_path / "u", Resources(report_to="tensorboard", **options))
    [folder] = (tmp_path / options.get("log_dir", "runs")).iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"forget_loss", "retain_loss"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("forget_loss")) == 4


def test_bfloat16_and_recomputed_activations_give_nearly_the_same_update(save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny()
    options = {"objective": "grad-diff", "optimizer": "sgd", "learning_rate": 0.1}
    exact = update_of(path, examples, tmp_path / "exact", **options)
    again = update_of(path, examples, tmp_path / "again", Resources(gradient_checkpointing=True), **options)
    assert distance(exact, again) < 1e-6
    rough = update_of(path, examples, tmp_path / "rough", Resources(precision="bfloat16"), **options)
    assert 1e-5 < distance(exact, rough) < 0.2


def test_the_dual_variable_follows_the_retain_loss(save_tiny, tmp_path: Path, examples, monkeypatch) -> None:
    alphas: list[float] = []
    original = DualAscent.finish

    def finish(combination: DualAscent, retain_loss: float, epoch: int) -> None:
        original(combination, retain_loss, epoch)
        alphas.append(combination.alpha)

    monkeypatch.setattr(DualAscent, "finish", finish)
    path = save_tiny()
    ends = []
    for target, warmup in ((0.0, 0), (1e3, 0), (0.0, 9)):
        parameters = {"retain_target": target, "dual_step": 0.5, "dual_warmup": warmup}
        update_of(path, examples, tmp_path / f"u{target}{warmup}", objective="pdu", parameters=parameters)
        ends.append(alphas[-1])
    unreachable, met, waiting = ends
    assert unreachable > 1.5
    assert met == 0
    assert waiting == 1
    assert len(alphas) == 3 * 4


def test_a_model_does_not_outlive_its_training(save_tiny, examples, tmp_path: Path, monkeypatch) -> None:
    import weakref

    loaded: list[weakref.ref] = []
    load_model = client_module.load_model

    def remembering(path: Path, device: str | None):
        model = load_model(path, device)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(client_module, "load_model", remembering)
    unlearn(
        save_tiny(), forget=examples[0], out=tmp_path / "update", training=Training(objective="grad-ascent", epochs=1)
    )
    assert len(loaded) == 1
    assert loaded[0]() is None
