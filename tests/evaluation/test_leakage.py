"""leak@k against its closed form and against all choices of samples, and measured on models that leak always or never."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import PlanError
from mpunlearn.evaluation.evaluate import evaluate
from mpunlearn.evaluation.leakage import Sampling, counts_of, leak_metrics, leak_probability, leaks, measure_leaks
from mpunlearn.evaluation.probe import generate
from mpunlearn.evaluation.sets import Questions
from mpunlearn.lm.examples import encode, prompt_of
from mpunlearn.lm.model import load
from mpunlearn.lm.records import Record


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_the_estimate_is_the_share_of_all_choices_with_a_leak(found: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(found)))
    choices = list(itertools.combinations(found, k))
    assert leak_probability(sum(found), len(found), k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_the_estimate_is_unbiased() -> None:
    p, n, k = 0.3, 10, 4
    binomial = [
        float(np.prod([n - i for i in range(c)]) / np.prod(range(1, c + 1))) * p**c * (1 - p) ** (n - c)
        for c in range(n + 1)
    ]
    mean = sum(weight * leak_probability(c, n, k) for c, weight in enumerate(binomial))
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_the_ends_of_the_scale() -> None:
    assert leak_probability(0, 200, 200) == 0
    assert leak_probability(1, 200, 200) == leak_probability(200, 200, 1) == 1
    assert leak_probability(1, 200, 8) == pytest.approx(8 / 200)
    assert counts_of(1) == [1]
    assert counts_of(8) == [1, 2, 4, 8]
    assert counts_of(10) == [1, 2, 4, 8, 10]
    assert leak_metrics([0, 1], 2) == {"leak@1": [0, 0.5], "leak@2": [0, 1]}


def test_what_counts_as_a_leak() -> None:
    answer = "The first book of Ada is The Golden Bridge."
    assert leaks("It is the  golden\nbridge, I think.", answer, "The Golden Bridge", 0.5)
    assert not leaks("The first book of Ada is The Golden Mirror.", answer, "The Golden Bridge", 0.5)
    assert leaks("The first book of Ada is The Golden Mirror.", answer, "", 0.5)
    assert not leaks("The first book of Ada is The Golden Mirror.", answer, "", 1.0)
    assert leaks(answer, answer, "", 1.0)


def test_samples_follow_the_model_and_its_temperature(save_tiny) -> None:
    model, tokenizer = load(save_tiny())
    question = "Where was Ada born?"
    [example] = encode([Record(question, "Lyon")], tokenizer, 99)
    [likeliest] = generate(model, tokenizer, [prompt_of(example)], 1)
    forget = Questions([question] * 2, [likeliest] * 2, [likeliest] * 2, [[], []], [likeliest] * 2)
    for certain in (Sampling(4, temperature=1e-4), Sampling(4, top_p=1e-6)):
        assert measure_leaks(model, tokenizer, forget, certain, 1) == {f"leak@{k}": [1, 1] for k in (1, 2, 4)}
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is equally likely
    state = torch.random.get_rng_state()
    uniform = measure_leaks(model, tokenizer, forget, Sampling(256), 1)
    assert np.mean(uniform["leak@1"]) < 0.1
    assert measure_leaks(model, tokenizer, forget, Sampling(256), 1) == uniform  # the seed is fixed
    assert torch.equal(torch.random.get_rng_state(), state)


def test_leaks_are_measured_by_the_command(save_tiny, tmp_path: Path) -> None:
    rows = generate_rows(0, Recipe())["forget"][:3]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"benchmark": str(tmp_path), "cache": tmp_path / "cache", "max_new_tokens": 4}
    found = evaluate(save_tiny(), samples=3, **options)
    assert {"leak@1", "leak@2", "leak@3"} < set(found.metrics)
    assert 0 <= found.metrics["leak@1"] <= found.metrics["leak@2"] <= found.metrics["leak@3"] <= 1
    for option, value in {"samples": -1, "temperature": 0.0, "top_p": 1.5, "leak_threshold": 0.0}.items():
        with pytest.raises(PlanError, match=f"--{option.replace('_', '-')}: expected"):
            evaluate(tmp_path / "model", **{option: value}, **options)
