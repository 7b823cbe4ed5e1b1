"""The bounds of the training plan: what the policy refuses by default, and which plans of ours it lets pass."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from mpunlearn import Training
from mpunlearn.client.network.bounds import PlanBounds
from mpunlearn.client.network.pins import ModelPolicy
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.network.policy_file import new_policy, with_tables
from mpunlearn.client.plausibility.report import Limits
from mpunlearn.demo import example, local
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import PlanError
from mpunlearn.protocol.objectives import OBJECTIVES
from mpunlearn.schema import explanation

ROOT = Path(__file__).parents[2]
HONEST = Training(learning_rate=1e-3, batch_size=8, epochs=2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"optimizer": "sgd"}, "optimizers are adamw_torch, adamw_torch_fused, asked for sgd"),
        ({"optimizer": "tensor_adam"}, "optimizers are"),
        ({"learning_rate": 2e-3}, "max learning rate is 0.001, asked for 0.002"),
        ({"learning_rate": 2e-2, "lora_rank": 4}, "max lora learning rate is 0.01"),
        ({"batch_size": 3}, "min batch size is 4"),
        ({"max_length": 31}, "min max length is 32"),
        ({"max_grad_norm": 0.0}, "max grad norm is 10, asked for 0"),
        ({"max_grad_norm": 1e9}, "max grad norm is 10"),
        ({"skip_tokens": 5}, "max skip tokens is 4"),
        ({"adam_epsilon": 1e-5}, "max adam epsilon is 1e-06"),
        ({"gamma": 0.05}, "gamma is 0.1 to 10 for npo, asked for 0.05"),
        ({"alpha": 0.0}, "alpha is 0.1 to 10 for npo, asked for 0"),
        ({"alpha": 20.0}, "alpha is 0.1 to 10"),
        ({"objective": "grad-ascent", "alpha": 1.5}, "alpha is 0 to 1 for grad-ascent"),
    ],
)
def test_what_is_out_of_bounds(change, why: str) -> None:
    assert PlanBounds().violations(HONEST) == []
    (found,) = PlanBounds().violations(replace(HONEST, **change))
    assert why in found


def test_a_round_needs_enough_steps() -> None:
    assert PlanBounds().too_few_steps(HONEST, 40) is None
    assert "2 epochs of 24 texts in batches of 8 are 6 steps; min steps is 8" in str(
        PlanBounds().too_few_steps(HONEST, 24)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_passes_with_its_defaults(objective) -> None:
    assert PlanBounds().violations(Training(objective=objective)) == []


def ours() -> dict[str, Training]:
    """The plans of the demos, of the example, and of the README and the guide that train."""
    names = {item.name for item in fields(Training)}
    from_yaml = {key: value for key, value in yaml.safe_load(example.RUN_YAML).items() if key in names}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"training=Training\((.*?)\),\n", readme)
    guide = (ROOT / "docs" / "guides" / "own-model.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"--objective npo --epochs 2 (.*)", guide)
    words = command.split()
    typed = {name[2:].replace("-", "_"): json.loads(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    return {
        "demo": local.TRAINING,
        "example and network-demo": Training(**from_yaml),
        "README, Python": eval(f"Training({written})", {"Training": Training}),
        "guide, step by step": Training(objective="npo", epochs=2, **typed),
    }


@pytest.mark.parametrize("name", ours())
def test_our_own_plans_are_within_the_default_bounds(name: str) -> None:
    plan, texts = ours()[name], len(generate_rows(0, Recipe())["forget"])
    assert PlanBounds().violations(plan) == []
    assert PlanBounds().too_few_steps(plan, texts) is None


def test_a_generated_policy_gives_every_bound_its_reason(tmp_path: Path) -> None:
    text = new_policy("ab" * 32, ModelPolicy(model_type="llama", layers=2), Limits())
    (tmp_path / "policy.toml").write_text(text, encoding="utf-8")
    policy = Policy.read(tmp_path / "policy.toml")
    assert policy == Policy("ab" * 32, model=ModelPolicy(model_type="llama", layers=2))
    for kind in (PlanBounds, Limits, ModelPolicy):
        for item in fields(kind):
            comment = re.search(rf"((?:^# .*\n)+)^(?:# )?{item.name} =", text, re.M)
            assert comment is not None, item.name
            assert explanation(item).split()[0] in comment[1]


def test_a_table_is_written_anew_and_the_rest_of_the_file_stays(tmp_path: Path) -> None:
    text = (
        f'# mine\nserver_key = "{"ab" * 32}"  # theirs\n\n[model]\nlayers = 1\n\n[plan]\nmin_steps = 2  # few texts\n'
    )
    text = with_tables(text, {"model": ModelPolicy(layers=2)})
    (tmp_path / "policy.toml").write_text(text, encoding="utf-8")
    policy = Policy.read(tmp_path / "policy.toml")
    assert policy.model == ModelPolicy(layers=2)
    assert policy.plan.min_steps == 2
    for kept in ("# mine", "# theirs", "# few texts"):
        assert kept in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[plan]\nmin_step = 1", "PlanBounds: unknown field 'min_step'"),
        ("[plan]\nmin_steps = -1", "policy: plan: min_steps: expected at least 0"),
        ("[plausibility]\nsingle = -0.5", "policy: plausibility: single: expected at least 0"),
        ("[process]\nexamine_minutes = 0", "policy: process: examine_minutes: expected a number above 0"),
        ("[model]\nlayers = 'x'", "expected an integer"),
    ],
)
def test_a_table_with_a_mistake_is_refused(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(f'server_key = "{"ab" * 32}"\n{text}')
    with pytest.raises(PlanError, match=why):
        Policy.read(tmp_path / "policy.toml")
