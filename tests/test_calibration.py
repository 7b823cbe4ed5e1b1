"""Calibration: the largest common noise that the budget allows, pinned in the lineage; moments against a slow loop."""

from pathlib import Path

import pytest
import torch

from mpunlearn import Perturbation, calibrate, preprocess
from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.demo.models import TrainedWorld, trained_world
from mpunlearn.errors import PlanError, StateError
from mpunlearn.lm.examples import encode
from mpunlearn.lm.model import load, nll
from mpunlearn.lm.moments import embedding_moment, input_moments
from mpunlearn.lm.records import Record, read_records
from mpunlearn.lm.sources import Data
from mpunlearn.server.lineage import VECTOR_LEVEL, Lineage

HIGH = 0.8
TEXTS = [
    Record(None, text) for text in ("The quick brown fox jumps.", "A much longer text about nothing at all, really.")
]


@pytest.fixture
def world() -> TrainedWorld:
    """A model that has learned something: the loss of an untrained one may rise or fall with noise."""
    return trained_world(0)


@pytest.fixture
def text(world: TrainedWorld, tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(world.data("retain").read_text().splitlines(keepends=True)[:60]))
    return file


def test_moments_are_those_of_a_loop_over_single_texts(save_tiny) -> None:
    model, tokenizer = load(save_tiny(model_type="qwen2"))
    examples = encode(TEXTS, tokenizer, 64)
    names = {f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in PARTS}
    inputs, moments = input_moments(model, tokenizer, examples, names, batch_size=2)
    assert set(inputs) == names
    assert len(moments) == 8  # queries, keys and values share an input, and so do gate and up
    seen: dict[str, list[torch.Tensor]] = {}
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0][0]))
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example.input_ids]))
    for name in names:
        rows = torch.cat(seen[name])
        torch.testing.assert_close(moments[inputs[name]], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_the_embedding_moment_is_that_of_a_loop_over_single_texts(save_tiny) -> None:
    model, tokenizer = load(save_tiny(model_type="qwen2"))
    examples = encode(TEXTS, tokenizer, 64)
    generator = torch.Generator().manual_seed(0)
    batch = [torch.tensor([example.input_ids]) for example in examples]
    with torch.no_grad():  # tokens are drawn for the whole batch at once
        logits = [model(input_ids=ids).logits[0, :-1] for ids in batch]
    drawn = (
        torch.multinomial(torch.cat(logits).softmax(-1), 1, generator=generator)
        .flatten()
        .split([len(rows) for rows in logits])
    )
    expected, count = torch.zeros(model.config.hidden_size, model.config.hidden_size), 0
    for ids, labels in zip(batch, drawn, strict=True):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        predicted = model(inputs_embeds=embedded).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(predicted, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, embedded)
        expected += gradient[0].T @ gradient[0]
        count += len(labels)
    found = embedding_moment(model, tokenizer, examples)
    torch.testing.assert_close(found, expected / count, rtol=1e-3, atol=1e-6)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_shaped(save_tiny, text: Path, tied: bool) -> None:
    model = save_tiny(tie_word_embeddings=tied)
    found = calibrate(model, calibration_text=text, function_budget=5.0)
    lineage = Lineage(Path(found.lineage))
    assert lineage.record.inputs.keys() >= {"model.embed_tokens.weight"}
    assert ("lm_head.weight" in lineage.record.inputs) is not tied
    assert lineage.record.common is not None
    sigma = lineage.record.common.sigma
    weight = Checkpoint(model).read("model.embed_tokens.weight")
    assert sigma["model.embed_tokens.weight"] == pytest.approx(found.level * float(weight.square().mean().sqrt()))
    assert sigma["model.norm.weight"] <= VECTOR_LEVEL * 1.0001


PARTS = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


@pytest.fixture
def high_levels(monkeypatch) -> None:
    """Levels at which even a model that has memorized its text notices the noise."""
    monkeypatch.setattr("mpunlearn.calibration.MAX_LEVEL", HIGH)


@pytest.mark.usefixtures("high_levels")
@pytest.mark.parametrize("shape", ["gauss", "whitened"])
def test_the_level_is_the_largest_within_the_budget_and_is_used(world, tmp_path: Path, text: Path, shape) -> None:
    model = world.original
    found = calibrate(model, calibration_text=text, function_budget=0.05, common_noise_shape=shape)
    assert 0 < found.stand_in_loss - found.loss <= 0.05
    assert 0.02 < found.level <= HIGH
    automatic = Perturbation(copies=1, kappa=0.0, reparameterization="none", common_noise="auto")
    published = preprocess(model, state=tmp_path / "s", out=tmp_path / "c", perturbation=automatic)
    assert published.offset is not None
    assert published.offset.floor == found.floor
    loaded, tokenizer = load(published.copies[0])
    examples = encode(read_records(text, Data(), "text"), tokenizer, 512)[1::2]
    loss = sum(nll(loaded, examples, 8, tokenizer)) / sum(example.tokens for example in examples)
    assert loss == pytest.approx(found.stand_in_loss, abs=1e-4)
    with pytest.raises(StateError, match="cannot be calibrated again"):
        calibrate(model, calibration_text=text)


@pytest.mark.usefixtures("high_levels")
def test_more_budget_gives_more_noise_and_an_unused_level_can_be_found_again(world, text: Path) -> None:
    little, much = (
        calibrate(world.original, calibration_text=text, function_budget=budget, common_noise_shape="gauss")
        for budget in (0.0005, 0.5)
    )
    assert little.level < 0.8 * much.level
    assert little.lineage == much.lineage


def test_a_budget_that_no_noise_keeps_is_an_error(world, text: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(PlanError, match="function-budget"):
        calibrate(world.original, calibration_text=text, function_budget=0.0)
    monkeypatch.setattr("mpunlearn.calibration.MIN_LEVEL", 0.8)
    monkeypatch.setattr("mpunlearn.calibration.MAX_LEVEL", 0.9)
    with pytest.raises(PlanError, match="even κ_c = 0.8"):
        calibrate(world.original, calibration_text=text, common_noise_shape="gauss", lineage=tmp_path / "l")
    assert Lineage(tmp_path / "l").record.common is None


def test_experts_have_no_moments(save_tiny, text: Path) -> None:
    model = save_tiny(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    found = calibrate(model, calibration_text=text, function_budget=5.0)
    source = Checkpoint(model)
    inputs = Lineage(Path(found.lineage)).record.inputs
    layers = {name for name, role in Architecture.of(source).tensor_roles(source).items() if role.expert is not None}
    assert inputs
    assert not layers & set(inputs)
