"""Every loss against values by hand, against a slow loop over tokens, and for what it must not depend on."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpunlearn.client.objectives import FORGET_LOSSES, RETAIN_LOSSES, Losses, jensun, jsd
from mpunlearn.lm.examples import IGNORED
from mpunlearn.lm.losses import answer_nll, token_nll
from mpunlearn.protocol.objectives import HYPERPARAMETERS, OBJECTIVES, Objective

PARAMETERS = {"beta": 0.7, "delta": 0.2, "beta1": 2.0, "beta2": 0.5, "steering": 1.5}
LOSSES = FORGET_LOSSES | {loss.__name__: loss for loss in RETAIN_LOSSES.values()}


def random_batch(examples: int, length: int, vocabulary: int, seed: int) -> dict[str, torch.Tensor]:
    """Everything that any loss can ask for, random, with at least one answer token in each example."""
    generator = torch.Generator().manual_seed(seed)

    def side() -> tuple[torch.Tensor, torch.Tensor]:
        logits = 3 * torch.randn(examples, length, vocabulary, generator=generator)
        targets = torch.randint(vocabulary, (examples, length), generator=generator)
        targets[torch.rand(examples, length, generator=generator) < 0.5] = IGNORED
        targets[:, -1] = 0
        return logits, targets

    batch = dict(zip(("logits", "targets"), side(), strict=True))
    batch |= dict(zip(("alternate_logits", "alternate_targets"), side(), strict=True))
    batch["reference_logits"] = side()[0]
    batch["reference_nll"] = 5 * torch.rand(examples, generator=generator)
    batch["alternate_reference_nll"] = 5 * torch.rand(examples, generator=generator)
    batch["hidden"], batch["reference_hidden"] = torch.randn(2, examples, length, 4, generator=generator)
    batch["control"] = torch.rand(4, generator=generator)
    return batch


def call(name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if name not in FORGET_LOSSES:
        [retain_loss] = [key for key, loss in RETAIN_LOSSES.items() if loss.__name__ == name]
        losses = Losses(Objective("grad_ascent", retain_loss=retain_loss))
        return losses.retain(**{key: batch[key] for key in losses.retain_needs})
    losses = Losses(Objective(name, parameters=PARAMETERS))
    return losses.forget(**{key: batch[key] for key in losses.needs})


def mean(name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean that the training loop makes of a loss's values."""
    values = call(name, batch)
    return values.sum() / (len(values) if values.dim() == 1 else (batch["targets"] != IGNORED).sum())


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def slow(name: str, batch: dict[str, torch.Tensor]) -> float:
    """The same mean, token by token in plain Python, from the formulas of the papers."""
    p = PARAMETERS
    plain = {key: tensor.tolist() for key, tensor in batch.items()}
    per_token, per_example = [], []

    def nll_of(side: str, example: int) -> tuple[float, int]:
        total, count = 0.0, 0
        for scores, target in zip(plain[side + "logits"][example], plain[side + "targets"][example], strict=True):
            if target != IGNORED:
                total -= math.log(softmax(scores)[target])
                count += 1
        return total, count

    def jsd_of(one: list[float], other: list[float]) -> float:
        middle = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
        terms = [a * math.log(a / m) for p in (one, other) for a, m in zip(p, middle, strict=True) if a > 0]
        return sum(terms) / 2

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for example in range(len(plain["targets"])):
        nll, count = nll_of("", example)
        other = nll_of("alternate_", example)[0]
        reference, alternate = plain["reference_nll"][example], plain["alternate_reference_nll"][example]
        distances, seen = [], 0
        refusal = [target for target in plain["alternate_targets"][example] if target != IGNORED]
        for position, target in enumerate(plain["targets"][example]):
            if target == IGNORED:
                continue
            scores, probabilities = plain["logits"][example][position], softmax(plain["logits"][example][position])
            own, teacher = probabilities[target], plain["reference_logits"][example][position]
            if name == "grad_ascent":
                per_token.append(math.log(own))
            elif name == "nll":
                per_token.append(-math.log(own))
            elif name == "wga":
                per_token.append(own ** p["beta"] * math.log(own))
            elif name == "satimp":
                per_token.append(own ** p["beta1"] * (1 - own) ** p["beta2"] * math.log(own))
            elif name == "undial":
                aim = softmax([score - p["beta"] * (v == target) for v, score in enumerate(teacher)])
                per_token.append(-sum(a * math.log(q) for a, q in zip(aim, probabilities, strict=True)))
            elif name == "ce_u":
                rest = 1 - own
                others = [(q / rest, q) for v, q in enumerate(probabilities) if v != target]
                per_token.append(-sum(a * math.log(q) for a, q in others))
            elif name == "pdu":
                per_token.append((max(scores) - sum(scores) / len(scores)) ** 2)
            elif name == "kl":
                pairs = zip(softmax(teacher), probabilities, strict=True)
                per_token.append(sum(a * math.log(a / q) for a, q in pairs))
            elif name == "jsd":
                per_token.append(jsd_of(softmax(teacher), probabilities))
            elif name == "jensun":
                aim = refusal[seen % len(refusal)]
                per_token.append(jsd_of([float(v == aim) for v in range(len(scores))], probabilities))
            seen += 1
            hidden = plain["hidden"][example][position]
            to = [p["steering"] * c for c in plain["control"]]
            to = plain["reference_hidden"][example][position] if name == "same_hidden" else to
            distances.append(sum((a - b) ** 2 for a, b in zip(hidden, to, strict=True)) / len(hidden))
        if name == "npo":
            per_example.append(-2 / p["beta"] * math.log(sigma(p["beta"] * (nll - reference))))
        elif name == "dpo":
            difference = (alternate - other) - (reference - nll)
            per_example.append(-2 / p["beta"] * math.log(sigma(p["beta"] * difference)))
        elif name == "simnpo":
            per_example.append(-2 / p["beta"] * math.log(sigma(p["beta"] * (nll / count - p["delta"]))))
        elif name in ("rmu", "same_hidden"):
            per_example.append(sum(distances) / len(distances))
    values = per_example or per_token
    return sum(values) / len(values)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 7), st.integers(0, 999))


@pytest.mark.parametrize("name", LOSSES)
@given(shapes)
@settings(deadline=None, max_examples=25)
def test_losses_equal_the_slow_loops(name: str, shape) -> None:
    batch = random_batch(*shape)
    assert float(mean(name, batch)) == pytest.approx(slow(name, batch), rel=2e-3, abs=2e-4)


def test_values_by_hand() -> None:
    # Two tokens, uniform logits: each of the two answer tokens costs ln 2, and has probability 1/2.
    ln2 = math.log(2)
    batch = {"logits": torch.zeros(1, 3, 2), "targets": torch.tensor([[IGNORED, 1, 0]])}
    batch |= {"reference_logits": batch["logits"], "reference_nll": torch.tensor([2 * ln2])}
    batch |= {"alternate_logits": torch.zeros(1, 1, 2), "alternate_targets": torch.tensor([[1]])}
    batch |= {"alternate_reference_nll": torch.tensor([ln2])}
    assert float(answer_nll(batch["logits"], batch["targets"])) == pytest.approx(2 * ln2)
    expected = {
        "grad_ascent": -ln2,
        "nll": ln2,
        "npo": 2 / 0.7 * ln2,  # at the reference
        "dpo": 2 / 0.7 * ln2,  # likewise, both terms vanish
        "simnpo": 2 / 0.7 * math.log(1 + math.exp(-0.7 * (ln2 - 0.2))),
        "undial": ln2,  # uniform logits make any target cost ln 2
        "satimp": -(0.5**2) * 0.5**0.5 * ln2,
        "wga": -(0.5**0.7) * ln2,
        "ce_u": ln2,  # all of the target lies on the other token
        "pdu": 0.0,  # uniform: the optimum
        "kl": 0.0,
        "jsd": 0.0,
        "jensun": 0.75 * math.log(4 / 3),  # both tokens of the answer: (1/2, 1/2) against (0, 1)
    }
    for name, value in expected.items():
        assert float(mean(name, batch)) == pytest.approx(value, abs=1e-6), name
    hidden = {"hidden": torch.tensor([[[3.0, 0.0], [1.0, 1.0]]]), "targets": torch.tensor([[IGNORED, 5]])}
    hidden |= {"control": torch.tensor([0.0, 1.0]), "reference_hidden": torch.tensor([[[0.0, 0.0], [1.0, 3.0]]])}
    assert float(mean("rmu", hidden)) == pytest.approx((1 + 0.25) / 2)
    assert float(mean("same_hidden", hidden)) == pytest.approx(2.0)


@pytest.mark.parametrize("name", LOSSES)
@given(shapes, st.integers(1, 5))
@settings(deadline=None, max_examples=15)
def test_padding_and_order_do_not_matter(name: str, shape, padding: int) -> None:
    batch = random_batch(*shape)
    examples = shape[0]
    order = torch.randperm(examples)
    padded = {}
    for key, tensor in batch.items():
        if tensor.dim() < 2:
            padded[key] = tensor
            continue
        filler = torch.randn(examples, padding, *tensor.shape[2:]).to(tensor.dtype)
        filler = torch.full_like(filler, IGNORED) if key.endswith("targets") else filler
        padded[key] = torch.cat((tensor, filler), dim=1)
    shuffled = {key: tensor if key == "control" else tensor[order] for key, tensor in batch.items()}
    assert torch.allclose(mean(name, batch), mean(name, padded), atol=1e-4)
    assert torch.allclose(mean(name, batch), mean(name, shuffled), atol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_down_the_forget_loss_makes_the_answers_less_likely_and_masked_positions_never_count(name: str) -> None:
    objective = OBJECTIVES[name]
    batch = random_batch(3, 6, 9, 1)
    # At the beginning the model is its own reference, and is sure of the answers.
    known = batch["targets"].clamp(min=0)
    batch["logits"] = (0.3 * batch["logits"]).scatter_add(2, known.unsqueeze(2), torch.full((3, 6, 1), 6.0))
    batch["reference_logits"] = batch["logits"].clone()
    batch["reference_nll"] = answer_nll(batch["logits"], batch["targets"])
    assert not bool((batch["targets"] == 2).any())
    batch["alternate_targets"][batch["alternate_targets"] != IGNORED] = 2  # refusals say something else
    moved = "hidden" if name == "rmu" else "logits"
    batch[moved] = batch[moved].clone().requires_grad_()
    losses = Losses(objective)
    losses.forget(**{key: batch[key] for key in losses.needs}).sum().backward()
    gradient = batch[moved].grad
    assert float(gradient[batch["targets"] == IGNORED].abs().max()) == 0
    if name == "rmu":
        aim = objective.parameters["steering"] * batch["control"]
        stepped = (batch["hidden"] - 0.1 * gradient).detach()
        counted = batch["targets"] != IGNORED
        assert bool(((stepped - aim).norm(dim=2) < (batch["hidden"] - aim).norm(dim=2))[counted].all())
        return
    stepped = (batch["logits"] - 0.1 * gradient).detach()
    assert bool((answer_nll(stepped, batch["targets"]) > answer_nll(batch["logits"], batch["targets"])).all())


def test_weights_are_detached() -> None:
    """The gradient of a weighted loss is the weight times the gradient of the loss, and nothing of the weight's own."""
    for name, weight in (
        ("wga", lambda p: p ** PARAMETERS["beta"]),
        ("satimp", lambda p: p ** PARAMETERS["beta1"] * (1 - p) ** PARAMETERS["beta2"]),
    ):
        batch = random_batch(1, 1, 5, 3)
        batch["logits"].requires_grad_()
        call(name, batch).sum().backward()
        weighted, batch["logits"].grad = batch["logits"].grad, None
        loss = token_nll(batch["logits"], batch["targets"])
        (-loss).sum().backward()
        assert torch.allclose(weighted, weight(torch.exp(-loss.detach())).item() * batch["logits"].grad)


@given(shapes)
@settings(deadline=None, max_examples=50)
def test_jsd_is_symmetric_bounded_by_ln_2_and_zero_for_equal_predictions(shape) -> None:
    batch = random_batch(*shape)
    logits, other, targets = 9 * batch["logits"], 9 * batch["reference_logits"], batch["targets"]
    assert float(jsd(logits, targets, logits.clone()).abs().max()) < 1e-6
    values = jsd(logits, targets, other)
    assert torch.allclose(values, jsd(other, targets, logits), atol=1e-6)
    assert float(values.min()) + 1e-6 >= 0
    assert float(values.max()) <= math.log(2) + 1e-6
    refused = jensun(logits, targets, batch["alternate_targets"])
    assert float(refused.min()) + 1e-6 >= 0
    assert float(refused.max()) <= math.log(2) + 1e-6


def test_jensun_is_ln_2_where_the_refusal_is_impossible_and_zero_where_it_is_certain() -> None:
    """And its gradient is finite at both ends."""
    targets, refusal = torch.tensor([[IGNORED, 3, 3, 3]]), torch.tensor([[IGNORED, 1, IGNORED, 2]])
    certain = 400 * torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 1]]), 5).float()
    for logits, value in ((certain, 0.0), (-certain, math.log(2))):
        leaf = logits.clone().requires_grad_()
        values = jensun(leaf, targets, refusal)
        assert values[0].tolist() == pytest.approx([0, value, value, value])
        values.sum().backward()
        assert bool(leaf.grad.isfinite().all())


def test_every_objective_needs_only_what_the_loop_provides() -> None:
    provided = set(random_batch(1, 1, 2, 0))
    for name, objective in OBJECTIVES.items():
        losses = Losses(objective)
        assert losses.needs | losses.retain_needs <= provided, name
        if losses.alternate_passes:
            assert "alternate_reference_nll" in losses.needs


def test_the_public_table_and_the_functions_are_complete() -> None:
    """Every objective has a function and every hyper-parameter a description, and none is left over."""
    assert {objective.forget_loss for objective in OBJECTIVES.values()} == set(FORGET_LOSSES)
    assert {name for objective in OBJECTIVES.values() for name in objective.parameters} == set(HYPERPARAMETERS)
    for loss in FORGET_LOSSES.values():
        keywords = {p.name for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert keywords <= set(HYPERPARAMETERS)


def test_only_kl_and_its_like_need_a_second_model() -> None:
    needing = {name for name, objective in OBJECTIVES.items() if Losses(objective).reference_model}
    assert needing == {"undial", "rmu", "jensun"}
    assert Losses(Objective("npo", retain_loss="kl")).reference_model
    assert not Losses(Objective("npo", retain_loss="kl", alpha=0.0)).reference_model
