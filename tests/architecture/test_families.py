"""Every family at every strength: the function stays, the inverse restores, and leaving any one map out shows."""

import pytest
import torch
from tests.conftest import tiny_model
from torch.overrides import TorchFunctionMode

from mpunlearn.architecture import FAMILIES, Architecture
from mpunlearn.server.reparameterization import IDENTITY, STRENGTHS, Reparameterization
from mpunlearn.server.secret import Secret

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
}
TOKENS = torch.arange(2, 26).reshape(2, 12)


def build(variant: str):
    model = tiny_model(variant.split()[0], **VARIANTS[variant])
    config = model.config.to_dict()
    architecture = Architecture(FAMILIES[config["model_type"]], config)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if architecture.tied:
        del weights["lm_head.weight"]
    return model, architecture, weights


class InFloat64(TorchFunctionMode):
    """Keeps float64 where a model's code casts to float32 (norms, softmax): exactness is about the maps, not their rounding."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return torch.Tensor.double(*wide) if function is torch.Tensor.float else function(*wide, **named)


def logits(model, weights) -> torch.Tensor:
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    with torch.no_grad(), InFloat64():
        return model(TOKENS).logits


def test_every_family_is_tested() -> None:
    assert {variant.split()[0] for variant in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_function_stays_and_the_inverse_restores(variant: str, strength: str) -> None:
    model, architecture, weights = build(variant)
    before = logits(model, weights)
    maps = Reparameterization(architecture, strength, Secret(b"k" * 32), 1, 0)
    places = {name: architecture.place(name) for name in weights}
    assert None not in places.values()
    published = {name: maps.apply(places[name], weight) for name, weight in weights.items()}
    after = logits(model, published)
    assert float((after - before).abs().max()) < 1e-10 * max(1.0, float(before.abs().max()))
    for name, weight in weights.items():
        assert float((maps.invert(places[name], published[name]) - weight).abs().max()) < 1e-12
    changed = [name for name in weights if not torch.equal(published[name], weights[name])]
    if strength == "none":
        assert not changed
    elif strength == "full":
        assert len(changed) == len(weights)


@pytest.mark.parametrize("strength", ["full", "paper"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_leaving_one_map_out_of_one_tensor_changes_the_function(variant: str, strength: str) -> None:
    model, architecture, weights = build(variant)
    before = logits(model, weights)
    maps = Reparameterization(architecture, strength, Secret(b"k" * 32), 1, 0)
    places = {name: architecture.place(name) for name in weights}
    published = {name: maps.apply(places[name], weight) for name, weight in weights.items()}
    controls = 0
    for name, place in places.items():
        for left_out in range(len(place.roles)):
            if maps._map(place.roles[left_out], place.layer) == IDENTITY:
                continue
            if place.roles == ("key",):
                continue  # a bias on the keys shifts every score of a query alike: softmax does not see it without RoPE
            partial = weights[name]
            for axis, role in enumerate(place.roles):
                if axis != left_out:
                    partial = maps._map(role, place.layer).apply(partial, axis)
            wrong = logits(model, {**published, name: partial})
            assert float((wrong - before).abs().max()) > 1e-6, f"{name}, axis {left_out}"
            controls += 1
    assert controls > 4


def test_permutations_and_signs_invert_exactly() -> None:
    _, architecture, weights = build("llama")
    maps = Reparameterization(architecture, "full", Secret(b"k" * 32), 1, 0)
    for name, weight in weights.items():
        place = architecture.place(name)
        if not {"query", "key", "value", "attended"} & set(place.roles):
            assert torch.equal(maps.invert(place, maps.apply(place, weight)), weight)


def test_copies_and_rounds_have_maps_of_their_own() -> None:
    _, architecture, weights = build("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    place = architecture.place(name)
    secret = Secret(b"k" * 32)
    published = [
        Reparameterization(architecture, "full", secret, round_number, copy).apply(place, weights[name])
        for round_number in (1, 2)
        for copy in (0, 1)
    ]
    for i, one in enumerate(published):
        assert all(not torch.equal(one, other) for other in published[i + 1 :])


def test_layers_have_maps_of_their_own_but_share_the_residual() -> None:
    _, architecture, _ = build("llama")
    maps = Reparameterization(architecture, "full", Secret(b"k" * 32), 1, 0)
    assert not torch.equal(maps._map("ffn", 0).index, maps._map("ffn", 1).index)
    assert torch.equal(maps._map("residual", 0).index, maps._map("residual", None).index)
    assert not torch.equal(maps._map("query", 0).blocks, maps._map("query", 1).blocks)
