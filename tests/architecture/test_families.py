"""Every family at every strength: the function stays, the inverse restores, steps commute, and a map left out shows."""

import dataclasses
import json
import math
from typing import get_args

import pytest
import torch
from tests.conftest import tiny_model
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion

from mpunlearn.architecture import FAMILIES, Architecture, Family, Heads
from mpunlearn.architecture.spaces import parse_axes
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import UnsupportedModelError
from mpunlearn.server.choices import choices
from mpunlearn.server.perturbation import Strength
from mpunlearn.server.reparameterization import Reparameterization
from mpunlearn.server.secret import Secret

STRENGTHS = get_args(Strength)

VARIANTS = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True, "mlp_bias": True},
    "llama head_dim": {"head_dim": 12},
    "llama one group": {"num_key_value_heads": 1},
    "llama scaled rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "qwen3 biased": {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    "gemma": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5},
    "gemma3_text": {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5},
    "phi": {},
    "phi all rotary": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    },
    "phi3": {},
    "phi3 partial rotary": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    },
    "gpt_neox": {"num_attention_heads": 2},
    "gpt_neox sequential": {"use_parallel_residual": False, "num_attention_heads": 2},
    "gpt_neox unbiased": {"attention_bias": False, "tie_word_embeddings": True},
    "olmo2": {},
    "olmo2 all heads": {"num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 5},
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
    "qwen3_moe all sparse": {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2},
}
TOKENS = torch.arange(2, 26).reshape(2, 12)


def build(variant: str):
    """A model, its architecture, and its tensors under their names on disk."""
    model = tiny_model(variant.split()[0], **VARIANTS[variant])
    config = model.config.to_dict()
    architecture = Architecture(FAMILIES[config["model_type"]], config)
    weights = {name: value.clone() for name, value in revert_weight_conversion(model, model.state_dict()).items()}
    if architecture.tied:
        del weights[architecture.family.head]
    assert architecture.required() <= set(weights)
    return model, architecture, weights


class InFloat64(TorchFunctionMode):
    """Keeps float64 where a model's code casts to float32 (norms, softmax): the maps are exact, float32 is not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return torch.Tensor.double(*wide) if function is torch.Tensor.float else function(*wide, **named)


def loaded(model, weights):
    """The same model with those tensors, given under their names on disk."""
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    return (
        type(model)
        .from_pretrained(
            None, config=model.config, state_dict=copies, dtype=torch.float64, experts_implementation="eager"
        )
        .eval()
    )


def logits(model, weights) -> torch.Tensor:
    with torch.no_grad(), InFloat64():
        return loaded(model, weights)(TOKENS).logits


def publish(architecture, maps, weights) -> dict[str, torch.Tensor]:
    """T on every tensor, under the published names."""
    roles = {name: architecture.role_of(name) for name in weights}
    assert None not in roles.values()
    assert all(architecture.shape(roles[name]) == tuple(weight.shape) for name, weight in weights.items())
    return {maps.published_name(name, roles[name]): maps.apply(roles[name], weight) for name, weight in weights.items()}


def test_every_family_is_tested() -> None:
    assert {variant.split()[0] for variant in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_function_stays_and_the_inverse_restores(variant: str, strength: str) -> None:
    model, architecture, weights = build(variant)
    before = logits(model, weights)
    maps = Reparameterization(architecture, strength, Secret(b"k" * 32), 1, 0)
    published = publish(architecture, maps, weights)
    assert set(published) == set(weights)
    after = logits(model, published)
    assert float((after - before).abs().max()) < 1e-10 * max(1.0, float(before.abs().max()))
    changed = 0
    for name, weight in weights.items():
        role = architecture.role_of(name)
        arrived = published[maps.published_name(name, role)]
        restored = maps.invert(role, arrived)
        if all(axis_map.blocks is None for axis_map in maps.maps(role)):
            assert torch.equal(restored, weight), name
        assert float((restored - weight).abs().max()) < 1e-12, name
        changed += not torch.equal(published[name], weight)
    if strength == "none":
        assert changed == 0
    elif strength == "full":
        by_chance = {("vocabulary",), ("head norm",), ("query norm",), ("key norm",)}
        assert changed >= len([name for name in weights if not set(architecture.role_of(name).axes) <= by_chance])
    else:
        assert changed > 4


def softmax_does_not_see(role) -> bool:
    """A bias on the keys shifts all scores of a query alike, except for RoPE: a control may be weak there."""
    return role.axes == (("key",),)


@pytest.mark.slow
@pytest.mark.parametrize("strength", ["full", "paper"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_leaving_one_map_out_of_one_tensor_changes_the_function(variant: str, strength: str) -> None:
    model, architecture, weights = build(variant)
    before = logits(model, weights)
    maps = Reparameterization(architecture, strength, Secret(b"k" * 32), 1, 0)
    published = publish(architecture, maps, weights)
    controls = 0
    for name in weights:
        role = architecture.role_of(name)
        axis_maps = maps.maps(role)
        for left_out, axis_map in enumerate(axis_maps):
            if axis_map.identity or softmax_does_not_see(role):
                continue
            if torch.equal(axis_map.apply(weights[name], left_out), weights[name]):
                continue  # a permutation of two heads can be the identity
            partial = weights[name]
            for axis, other in enumerate(axis_maps):
                if axis != left_out:
                    partial = other.apply(partial, axis)
            wrong = logits(model, {**published, maps.published_name(name, role): partial})
            assert float((wrong - before).abs().max()) > 1e-7, f"{name}, axis {left_out}"
            controls += 1
        if role.expert is not None and maps.published_name(name, role) != name:
            other = maps.published_name(name, role)
            swapped = {**published, other: published[name], name: published[other]}
            assert float((logits(model, swapped) - before).abs().max()) > 1e-7, name
            controls += 1
    assert controls > 4


def trained(model, optimizer_of, keep: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The update of one step on a next-token loss, under the names on disk."""
    parameters = dict(model.named_parameters())
    optimizer = optimizer_of(parameters.values())
    with InFloat64():
        model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    after = revert_weight_conversion(model, {name: p.detach() for name, p in parameters.items()})
    return {name: after[name] - tensor for name, tensor in keep.items() if name in after}


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, eps=1e-6, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_in_published_coordinates_is_the_step_in_the_original_ones(variant: str, optimizer: str) -> None:
    """Equivariance: for SGD under every map, for AdamW under all but rotations."""
    model, architecture, weights = build(variant)
    exact = trained(loaded(model, weights), OPTIMIZERS[optimizer], weights)
    maps = Reparameterization(architecture, "full", Secret(b"k" * 32), 1, 0)
    if optimizer == "adamw":
        drawn = maps._cached
        maps._cached = lambda *axis: dataclasses.replace(drawn(*axis), blocks=None)
    published = publish(architecture, maps, weights)
    updates = trained(loaded(model, published), OPTIMIZERS[optimizer], published)
    scale = max(float(update.abs().max()) for update in exact.values())
    worst = wrong = 0.0
    for name, update in exact.items():
        role = architecture.role_of(name)
        restored = maps.invert(role, updates[maps.published_name(name, role)])
        worst = max(worst, float((restored - update).abs().max()))
        left_out = maps.maps(role)[-1].invert(updates[maps.published_name(name, role)], len(role.axes) - 1)
        wrong = max(wrong, float((left_out - update).abs().max()))
    assert worst < 1e-10 * max(1.0, scale)
    assert wrong > 1e-4 * scale


def test_copies_and_rounds_have_maps_of_their_own() -> None:
    _, architecture, weights = build("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    role = architecture.role_of(name)
    secret = Secret(b"k" * 32)
    published = [
        Reparameterization(architecture, "full", secret, round_number, copy).apply(role, weights[name])
        for round_number in (1, 2)
        for copy in (0, 1)
    ]
    for i, one in enumerate(published):
        assert all(not torch.equal(one, other) for other in published[i + 1 :])


def test_layers_and_experts_have_maps_of_their_own_but_share_the_residual() -> None:
    _, architecture, _ = build("mixtral")
    maps = Reparameterization(architecture, "full", Secret(b"k" * 32), 1, 0)
    hidden = [maps._cached(("ffn",), layer, expert).index.tolist() for layer in (0, 1) for expert in (0, 1)]
    assert len({tuple(order) for order in hidden}) == 4
    assert torch.equal(maps._cached(("residual",), 0, None).index, maps._cached(("residual",), None, None).index)
    assert not torch.equal(maps._cached(("query",), 0, None).blocks, maps._cached(("query",), 1, None).blocks)


def test_what_full_chooses_is_counted() -> None:
    """Against counting by hand on a model small enough to."""
    _, architecture, _ = build("llama")
    chosen = {choice.space: choice for choice in choices(architecture, "full")}
    assert chosen["residual"].bits == pytest.approx(math.log2(math.factorial(32)) + 32)
    assert chosen["ffn"].bits == pytest.approx(2 * (math.log2(math.factorial(40)) + 40))
    assert (chosen["query-key"].bits, chosen["query-key"].angles) == (0, 2 * 2 * 4)
    assert chosen["value"].angles == 2 * 2 * 28
    assert chosen["heads"].bits == pytest.approx(2 * (1 + 2))
    _, architecture, _ = build("qwen3_moe")
    chosen = {choice.space: choice for choice in choices(architecture, "full")}
    assert chosen["experts"].bits == pytest.approx(math.log2(120))
    assert chosen["ffn of an expert"].spaces == 5
    assert chosen["ffn"].spaces == 1
    assert (chosen["query-key"].bits, chosen["query-key"].angles) == (2 * 2 * 4, 0)
    assert choices(architecture, "none") == []


def test_a_table_with_a_role_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown roles \['hidden'\]"):
        Family({"a.weight": "residual, hidden"})


def test_an_entry_of_a_table_is_read_axis_by_axis() -> None:
    assert parse_axes("query + key + value, residual") == (("query", "key", "value"), ("residual",))
    assert parse_axes("head norm") == (("head norm",),)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"hidden_size": None}, "hidden_size: expected a positive integer, found None"),
        ("llama", {"num_key_value_heads": 3}, "found 4 heads, 3 key-value heads and 8 rotary dimensions of 8"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "unquantized"),
        ("llama", {"model_type": "mamba"}, "'mamba' is not supported; known families: gemma"),
        (
            "phi",
            {"rope_parameters": {"partial_rotary_factor": "half"}},
            "partial_rotary_factor: expected a number above",
        ),
        ("phi", {"rope_parameters": None, "partial_rotary_factor": 2.0}, "partial_rotary_factor: .*, found 2.0"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers to be a list of layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step to be a positive integer"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_with_its_path(save_tiny, model_type, change, message) -> None:
    path = save_tiny(model_type=model_type, **VARIANTS[model_type])
    config = json.loads((path / "config.json").read_text())
    Architecture.of(Checkpoint(path))
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedModelError, match=f"{path}.*{message}"):
        Architecture.of(Checkpoint(path))


@pytest.mark.parametrize(
    "given",
    [{"rope_parameters": {"partial_rotary_factor": 0.75}}, {"partial_rotary_factor": 0.75}, {"rotary_pct": 0.75}],
)
def test_the_rotary_share_is_read_wherever_a_config_says_it(given) -> None:
    sizes = {
        "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 9, "intermediate_size": 8,
    }  # fmt: skip
    assert Architecture(FAMILIES["phi3"], {**sizes, **given}).heads == Heads(4, 4, 16, 12)
    assert Architecture(FAMILIES["phi3"], sizes).heads.rotary == 16
