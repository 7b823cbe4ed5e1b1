"""Sharpness-aware minimization: by hand on a quadratic, and in training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.client.training import distance, update_of

from mpunlearn.checkpoint import Checkpoint
from mpunlearn.client.resources import Resources
from mpunlearn.client.sharpness import Sharpness
from mpunlearn.errors import PlanError
from mpunlearn.protocol.plan import Training
from mpunlearn.schema import parse


def test_a_quadratic_by_hand() -> None:
    """L(w) = (w₁² + 2 w₂²) / 2 has the gradient (w₁, 2 w₂): at (3, 2) that is (3, 4), of norm 5."""
    w = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
    unused = torch.nn.Parameter(torch.ones(2))

    def backward() -> None:
        ((w**2 * torch.tensor([1.0, 2.0])).sum() / 2).backward()

    sharpness = Sharpness([w, unused], 0.5)
    sharpness.aim(backward)
    assert w.grad is None
    with sharpness.perturbed():
        assert torch.allclose(w.detach(), torch.tensor([3.3, 2.4]))
        backward()
    assert torch.equal(w.detach(), torch.tensor([3.0, 2.0]))
    assert torch.allclose(w.grad, torch.tensor([3.3, 4.8]))


def test_weights_are_restored_bit_by_bit_also_after_an_error() -> None:
    w = torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    before = w.detach().clone()
    sharpness = Sharpness([w], 0.123)
    sharpness.aim(lambda: w.sin().sum().backward())

    def fail() -> None:
        with sharpness.perturbed():
            assert float((w.detach() - before).norm()) == pytest.approx(0.123, rel=1e-5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(w.detach(), before)


@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan")])
def test_a_gradient_without_direction_moves_nothing(factor: float) -> None:
    w = torch.nn.Parameter(torch.ones(3))
    sharpness = Sharpness([w], 1.0)
    sharpness.aim(lambda: (factor * w).sum().backward())
    with sharpness.perturbed():
        assert torch.equal(w.detach(), torch.ones(3))


@pytest.mark.parametrize("objective", ["npo", "dpo", "ngdiff", "jensun", "repselect"])
def test_micro_batches_do_not_change_the_update(save_tiny, tmp_path: Path, examples, objective: str) -> None:
    path = save_tiny()
    options = {"objective": objective, "optimizer": "sgd", "learning_rate": 0.1, "sam_radius": 0.2}
    whole = update_of(path, examples, tmp_path / "whole", **options)
    parts = update_of(path, examples, tmp_path / "parts", Resources(micro_batch_size=1), **options)
    assert distance(whole, parts) < (1e-3 if objective == "jensun" else 1e-4)
    plain = update_of(path, examples, tmp_path / "plain", **{**options, "sam_radius": 0.0})
    assert distance(whole, plain) > 1e-3


def test_the_first_step_is_the_forget_gradient_there_and_the_retain_gradient_here(
    save_tiny, tmp_path: Path, examples
) -> None:
    """One step of SGD at w + ρ g / ‖g‖, taken apart with runs that do not use SAM."""
    path = save_tiny()
    step = {"batch_size": 6, "epochs": 1, "optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0}
    ascent = update_of(path, examples, tmp_path / "g", **step, objective="grad-ascent")
    norm = sum(float(tensor.square().sum()) for tensor in ascent.values()) ** 0.5
    weights = {name: Checkpoint(path).read(name) for name in Checkpoint(path).tensors}
    moved = {name: value - 0.3 / norm * ascent[name] if name in ascent else value for name, value in weights.items()}
    there = save_tiny("there")
    save_file(moved, there / "model.safetensors", metadata={"format": "pt"})
    forget = update_of(there, examples, tmp_path / "f", **step, objective="grad-ascent")
    retain = update_of(path, examples, tmp_path / "r", **step, objective="grad-diff", gamma=0.0)
    sam = update_of(path, examples, tmp_path / "sam", **step, objective="grad-diff", sam_radius=0.3)
    assert distance(sam, {name: forget[name] + retain[name] for name in sam}) < 1e-4
    assert distance(sam, {name: ascent[name] + retain[name] for name in sam}) > 1e-3


def test_lora_and_older_plans(save_tiny, tmp_path: Path, examples) -> None:
    update_of(save_tiny(), examples, tmp_path / "lora", sam_radius=0.05, lora_rank=2)
    content = Training().to_json()
    del content["sam_radius"]
    assert parse(Training, content) == Training()
    with pytest.raises(PlanError, match="--sam-radius: expected a number of at least 0"):
        Training(sam_radius=-1.0)
