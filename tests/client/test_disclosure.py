"""Which weights are token-local, and when a training says beforehand what its update will reveal."""

import re
import warnings

import pytest
import torch
from tests.architecture.test_families import TOKENS, VARIANTS, build
from tests.client.training import trained_shapes, update_of, with_options

from mpunlearn.client.batches import Pick
from mpunlearn.client.disclosure import longest_step, warn_of_spelling
from mpunlearn.client.weights import LAYER, adapt, naming, select, trained
from mpunlearn.errors import DisclosureWarning, PlanError
from mpunlearn.lm.examples import Example
from mpunlearn.protocol.exchange import Card


def with_inputs_of_their_own_token(model) -> set[str]:
    """Names of the layers' matrices whose input at the last position depends on that position's token alone."""
    seen, found, embedded = {}, set(), []

    def keep(name: str, arguments: tuple, named: dict) -> None:
        seen[name] = arguments[0] if arguments else named["hidden_states"]

    handles = [
        model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: embedded.append(output))
    ]
    owners = {
        name: model.get_submodule(name.rpartition(".")[0])
        for name, parameter in model.named_parameters()
        if re.search(LAYER, name) and parameter.dim() >= 2
    }
    for name, module in owners.items():
        hook = lambda module, arguments, named, name=name: keep(name, arguments, named)  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    model(TOKENS[:1])
    for handle in handles:
        handle.remove()
    for name, inputs in seen.items():
        last = inputs.reshape(-1, inputs.shape[-1])[-1]
        (gradient,) = torch.autograd.grad(last.square().sum(), embedded[0], retain_graph=True)
        if not gradient[0, :-1].any():
            assert gradient[0, -1].any()
            found.add(name)
    assert len(seen) == len(owners)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_leave_out_exactly_the_weights_whose_input_depends_on_one_token(variant: str) -> None:
    model, architecture, weights = build(variant)
    in_layers = {name for name, _ in model.named_parameters() if re.search(LAYER, name)}
    local = with_inputs_of_their_own_token(model.float())
    assert 0 < len(local) < 6
    assert in_layers - select(model, "blocks") == local
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} & in_layers == local
    assert select(model, "blocks", token_local=True) == in_layers
    # Under their names on disk, which the server goes by, they are the same.
    assert {name for name in weights if architecture.token_local(architecture.role_of(name))} == local
    everything = {name for name, _ in model.named_parameters()}
    assert naming(model, everything) == local | {
        name for name in everything if re.search(r"embed|lm_head\.weight", name)
    }


def test_lora_has_no_adapters_on_them_either() -> None:
    model, _, _ = build("phi")
    adapted = adapt(model, 2, 4.0, select(model, "blocks"), 0, None)
    adapters = set(trained_shapes(adapted))
    assert not [name for name in adapters if re.search(r"layers\.0\..*(q_proj|k_proj|v_proj|fc1|fc2)", name)]
    assert [name for name in adapters if re.search(r"layers\.1\..*q_proj", name)]


def test_blocks_of_an_unknown_family_are_refused() -> None:
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(PlanError, match="not known for model_type 'gpt2'; name the weights"):
        select(model, "blocks")
    assert select(model, r"\.h\.0\.mlp")


def test_the_inner_lora_factor_is_drawn_for_each_copy_and_stays_as_it_is(save_tiny, tmp_path, examples) -> None:
    first = update_of(save_tiny(), examples, tmp_path / "u", lora_rank=2)
    again = update_of(tmp_path / "model", examples, tmp_path / "v", lora_rank=2, learning_rate=1e-2)
    for name, value in first.items():
        assert torch.equal(value, again[name]) == name.endswith("lora_A"), name

    def drawn(card: Card | None, seed: int = 0) -> dict[str, torch.Tensor]:
        model, _, _ = build("llama")
        parts = trained(adapt(model, 2, 4.0, select(model, "blocks"), seed, card))
        return {name: part.parameter.detach() for part in parts for name in part.shapes if name.endswith("A")}

    card = Card("0" * 32, 1, 1, 2)
    other = (Card("0" * 32, 1, 2, 2), Card("0" * 32, 2, 1, 2), Card("1" * 32, 1, 1, 2), None)
    mine, others = drawn(card), [*map(drawn, other), drawn(card, seed=1)]
    assert all(torch.equal(value, mine[name]) for name, value in drawn(card).items())
    assert not any(torch.equal(value, different[name]) for name, value in mine.items() for different in others)
    values = list(mine.values())
    assert not any(torch.equal(one, two) for i, one in enumerate(values) for two in values[i + 1 :])
    for value in values:
        assert 0.5 * value.shape[1] ** -0.5 < float(value.abs().max()) <= value.shape[1] ** -0.5


@pytest.mark.parametrize(
    ("options", "positions", "warned"),
    [
        ({"optimizer": "sgd"}, 95, "--optimizer sgd .* more than 95 tokens, fewer than the 96 dim"),
        ({"optimizer": "sgd"}, 96, None),
        ({"optimizer": "tensor_adam"}, 40, "--optimizer tensor_adam"),
        ({"optimizer": "adafactor"}, 40, "--optimizer adafactor"),
        ({"adam_epsilon": 1e-2}, 40, "--adam-epsilon 0.01"),
        ({"adam_epsilon": 1e-2}, 400, None),
        ({}, 40, None),
        ({"optimizer": "rmsprop"}, 40, None),
    ],
)
def test_a_training_that_lets_texts_be_spelled_out_says_so(options, positions: int, warned: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_spelling(with_options(**options), positions, 96)
    assert [warning.category for warning in caught] == ([DisclosureWarning] if warned else [])
    assert all(re.search(str(warned), str(warning.message)) for warning in caught)


def test_it_says_so_before_the_training_and_once_for_all_copies(save_tiny, tmp_path, examples, monkeypatch) -> None:
    from mpunlearn.client import client as client_module
    from mpunlearn.client.client import Client

    path = save_tiny(hidden_size=256)
    options = {"objective": "grad-ascent", "optimizer": "sgd", "batch_size": 2, "learning_rate": 0.1}
    client = Client(forget=examples[0], training=with_options(**options))
    with monkeypatch.context() as patch, pytest.raises(DisclosureWarning, match="spell out your examples"):
        patch.setattr(client_module.Trainer, "train", lambda self: pytest.fail("trained without a warning"))
        client.unlearn(path, tmp_path / "u")
    client.unlearn(path, tmp_path / "v")


def test_the_longest_step_counts_every_example_of_it() -> None:
    def of(length: int) -> Example:
        return Example([3] * length, [3] * length)

    forget, retain, alternates = [of(2), of(5)], [of(10), of(20)], [[of(100), of(200)], [of(300)]]
    steps = [[Pick(0, 0, 3), Pick(1, 0, 0)], [Pick(0, 1, 0)]]
    assert longest_step(steps, forget, retain) == 2 + 10 + 5 + 10
    assert longest_step(steps, forget, retain, alternates) == 2 + 10 + 200 + 5 + 10 + 300
    assert longest_step([[Pick(1, None, 0)], [Pick(0, None, 0)]], forget, []) == 5
