"""A probe equals a loop over single examples, whatever else is in the batch; generation is greedy."""

import numpy as np
import pytest
import torch

from mpunlearn.evaluation import probe as probes
from mpunlearn.evaluation.definitions import STRICT
from mpunlearn.evaluation.probe import generate, probe
from mpunlearn.evaluation.tofu import gradnorm_score
from mpunlearn.lm.examples import IGNORED, Example, prompt_of
from mpunlearn.lm.model import load


def example(*tokens: int, prompt: int) -> Example:
    return Example(list(tokens), [IGNORED if i < prompt else token for i, token in enumerate(tokens)])


EXAMPLES = [
    example(5, 6, 7, 8, 9, 2, prompt=2),
    example(10, 11, 12, prompt=1),
    example(3, 4, 5, 6, 7, 8, 9, 10, 11, prompt=5),
]


@pytest.fixture
def loaded(save_tiny):
    return load(save_tiny())


@pytest.mark.parametrize("tokens", [1, 20, 8192])
def test_probes_equal_a_loop_over_single_examples(loaded, monkeypatch, tokens: int) -> None:
    monkeypatch.setattr(probes, "BATCH_TOKENS", tokens)
    model, tokenizer = loaded
    for given, probed in zip(EXAMPLES, probe(model, tokenizer, EXAMPLES), strict=True):
        logits = model(input_ids=torch.tensor([given.input_ids])).logits[0].detach().double()
        positions = [i for i, label in enumerate(given.labels) if label != IGNORED]
        for index, position in enumerate(positions):
            logprobs = logits[position - 1].log_softmax(dim=0)
            p = logprobs.exp()
            own = given.input_ids[position]
            assert probed.logprobs[index] == pytest.approx(float(logprobs[own]), abs=1e-4)
            assert bool(probed.matches[index]) == (int(logprobs.argmax()) == own)
            mean = float((p * logprobs).sum())
            assert probed.mean[index] == pytest.approx(mean, abs=1e-3)
            spread = float((p * (logprobs - mean) ** 2).sum()) ** 0.5
            assert probed.deviation[index] == pytest.approx(spread, abs=1e-3)
        assert len(probed.logprobs) == len(positions)
        assert probed.ends == (given.input_ids[-1] == tokenizer.eos_token_id)


@pytest.mark.parametrize("tokens", [1, 8192])
def test_generation_is_greedy_and_batches_do_not_matter(loaded, monkeypatch, tokens: int) -> None:
    monkeypatch.setattr(probes, "BATCH_TOKENS", tokens)
    model, tokenizer = loaded
    prompts = [prompt_of(given) for given in EXAMPLES]
    assert prompts[0] == [5, 6]
    for prompt, text in zip(prompts, generate(model, tokenizer, prompts, 6), strict=True):
        ids = list(prompt)
        for _ in range(6):
            following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(following)
            if following == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_gradient_norms_are_means_over_parameters(loaded) -> None:
    model, tokenizer = loaded
    given = EXAMPLES[0]
    score = gradnorm_score(model, tokenizer, given, STRICT)
    labels = torch.tensor([given.labels])
    model(input_ids=torch.tensor([given.input_ids]), labels=labels).loss.backward()
    norms = [float(parameter.grad.norm()) for parameter in model.parameters()]
    assert score == pytest.approx(np.mean(norms), rel=1e-4)
    assert len(norms) > 10
