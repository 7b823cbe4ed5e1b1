"""The scores of relearning and quantization by hand, and NF4 against its published levels."""

import json
from pathlib import Path

import pytest
import torch

from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.evaluation import durability
from mpunlearn.evaluation.evaluate import evaluate
from mpunlearn.lm.model import load

# Dettmers et al., arXiv 2305.14314, appendix E, to seven digits.
NF4 = """-1 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0 0.0795803 0.1609302 0.2461123 0.3379152
0.4407098 0.5626170 0.7229568 1"""


@pytest.mark.parametrize(
    ("model", "retrained", "expected"),
    [
        ((0.1, 0.5), (0.1, 0.2), 0.25),
        ((0.1, 0.15), (0.1, 0.2), 1.0),  # learns more slowly than the retrained model
        ((0.1, 0.05), (0.1, 0.2), 1.0),
        ((0.1, 0.2), (0.2, 0.1), 0.0),
        ((0.1, 0.1), (0.2, 0.1), 1.0),
    ],
)
def test_relearning(model: tuple[float, float], retrained: tuple[float, float], expected: float) -> None:
    assert durability.relearning_score(model, retrained) == pytest.approx(expected)


def test_quantization() -> None:
    assert durability.quantization_score((0.1, 0.55)) == pytest.approx(0.5)
    assert durability.quantization_score((0.1, 0.05)) == 1
    assert durability.quantization_score((1.0, 1.0)) == 1


def test_scores_are_combined_as_far_as_they_were_measured() -> None:
    curves = {durability.RELEARNED: {"0": 0.1, "1": 0.5}, durability.QUANTIZED: {"float32": 0.1, "nf4": 0.55}}
    retrained = {**curves, durability.RELEARNED: {"0": 0.1, "1": 0.3}}
    assert durability.scores({}, None) == {}
    assert durability.scores(curves, None) == {"quantization_score": pytest.approx(0.5)}
    assert durability.scores(curves, retrained) == pytest.approx(
        {"relearning_score": 0.5, "quantization_score": 0.5, "robustness_score": 0.5}
    )


def test_the_levels_are_those_of_the_paper() -> None:
    assert durability.nf4_levels().tolist() == pytest.approx([float(level) for level in NF4.split()], abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_matrices_are_rounded_to_the_nearest_level_of_their_block(save_tiny, family: str) -> None:
    sizes = {"num_local_experts": 2} if family == "mixtral" else {}
    sizes |= {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24} if family == "qwen3_moe" else {}
    model, _ = load(save_tiny("model", family, **sizes))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    durability.round_nf4(model)
    levels = durability.nf4_levels()
    for name, parameter in model.named_parameters():
        rounded = "proj" in name or "gate.weight" in name
        assert torch.equal(parameter, before[name]) != rounded, name
        if rounded:
            old, new = before[name].flatten(), parameter.detach().flatten()
            for start in range(0, len(old), durability.BLOCK):
                block = old[start : start + durability.BLOCK]
                scale = block.abs().max()
                nearest = (block[:, None] / scale - levels).abs().min(dim=1).values
                found = (block - new[start : start + durability.BLOCK]).abs() / scale
                assert torch.allclose(found, nearest, atol=1e-6)


def test_a_retrained_model_is_as_robust_as_itself(save_tiny, tmp_path: Path) -> None:
    rows = generate_rows(0, Recipe())["forget"][:6]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = save_tiny()
    found = evaluate(
        path, benchmark=str(tmp_path), retain_model=path, robustness=True, max_new_tokens=2, cache=tmp_path / "cache"
    )
    assert found.metrics["relearning_score"] == 1
    before, after = found.robustness[durability.RELEARNED]["model"].values()
    assert pytest.approx(found.metrics["forget_Q_A_Prob"]) == before < after  # one step of training helps
    assert 0 < found.metrics["quantization_score"] <= 1
