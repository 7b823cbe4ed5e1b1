import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpunlearn.client.dataset import IGNORED
from mpunlearn.client.objectives import OBJECTIVES, answer_nll, cross_entropy, grad_ascent, npo


def batch(examples: int, length: int, vocabulary: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits and labels with at least one answer token in each example."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(examples, length, vocabulary, generator=generator, dtype=torch.float32)
    labels = torch.randint(vocabulary, (examples, length), generator=generator)
    labels[torch.rand(examples, length, generator=generator) < 0.5] = IGNORED
    labels[:, -1] = 0
    return logits, labels


def slow_nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], list[int]]:
    """Token by token in plain Python."""
    sums, counts = [], []
    for example in range(len(labels)):
        total, count = 0.0, 0
        for position in range(labels.shape[1] - 1):
            target = int(labels[example, position + 1])
            if target != IGNORED:
                scores = [float(value) for value in logits[example, position]]
                total += math.log(sum(math.exp(score) for score in scores)) - scores[target]
                count += 1
        sums.append(total)
        counts.append(count)
    return sums, counts


shapes = st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(2, 7), st.integers(0, 999))


@given(shapes)
@settings(deadline=None)
def test_losses_equal_the_slow_loops(shape) -> None:
    logits, labels = batch(*shape)
    sums, counts = slow_nll(logits, labels)
    assert answer_nll(logits, labels).tolist() == pytest.approx(sums, rel=1e-4, abs=1e-5)
    mean = sum(sums) / sum(counts)
    assert float(cross_entropy(logits, labels)) == pytest.approx(mean, rel=1e-4, abs=1e-5)
    assert float(grad_ascent(logits, labels)) == pytest.approx(-mean, rel=1e-4, abs=1e-5)
    reference = [total - 0.7 * number for number, total in enumerate(sums)]
    expected = 0.0
    for total, other in zip(sums, reference, strict=True):
        expected += -(2 / 0.3) * math.log(1 / (1 + math.exp(-0.3 * (total - other)))) / len(sums)
    assert float(npo(logits, labels, torch.tensor(reference), 0.3)) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_values_by_hand() -> None:
    # Two tokens, uniform logits: each answer token costs ln 2. NPO at the reference is (2/β) ln 2.
    logits, labels = torch.zeros(1, 3, 2), torch.tensor([[IGNORED, 1, 0]])
    assert float(answer_nll(logits, labels)) == pytest.approx(2 * math.log(2))
    assert float(cross_entropy(logits, labels)) == pytest.approx(math.log(2))
    assert float(npo(logits, labels, torch.tensor([2 * math.log(2)]), 0.1)) == pytest.approx(20 * math.log(2))


@given(shapes, st.integers(1, 5))
@settings(deadline=None)
def test_padding_and_order_do_not_matter(shape, padding: int) -> None:
    logits, labels = batch(*shape)
    examples, _, vocabulary = logits.shape
    padded = torch.cat((logits, torch.randn(examples, padding, vocabulary)), dim=1)
    padded_labels = torch.cat((labels, torch.full((examples, padding), IGNORED)), dim=1)
    reference = torch.arange(examples, dtype=torch.float32)
    order = torch.randperm(examples)
    for loss in (grad_ascent, cross_entropy):
        assert torch.allclose(loss(logits, labels), loss(padded, padded_labels))
        assert torch.allclose(loss(logits, labels), loss(logits[order], labels[order]), atol=1e-6)
    assert torch.allclose(npo(logits, labels, reference, 0.1), npo(padded, padded_labels, reference, 0.1))
    shuffled = npo(logits[order], labels[order], reference[order], 0.1)
    assert torch.allclose(npo(logits, labels, reference, 0.1), shuffled, atol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_down_the_forget_loss_makes_the_answers_less_likely(name: str) -> None:
    logits, labels = batch(3, 6, 9, 1)
    objective = OBJECTIVES[name]
    logits.requires_grad_()
    extra = {} if objective.beta is None else {"beta": objective.beta}
    if objective.reference:
        extra["reference_nll"] = answer_nll(logits, labels).detach()
    objective.forget_loss(logits, labels, **extra).backward()
    stepped = (logits - 0.1 * logits.grad).detach()
    assert bool((answer_nll(stepped, labels) > answer_nll(logits, labels)).all())
    masked = labels[:, 1:] == IGNORED
    assert float(logits.grad[:, :-1][masked].abs().max()) == 0
    assert float(logits.grad[:, -1].abs().max()) == 0
