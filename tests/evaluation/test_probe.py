"""A probe equals a loop over single examples, whatever else is in the batch; generation is greedy."""

import json

import numpy as np
import pytest
import torch

from mpunlearn.evaluation import probe as probes
from mpunlearn.evaluation.definitions import STRICT
from mpunlearn.evaluation.probe import generate, probe
from mpunlearn.evaluation.tofu import gradnorm_score
from mpunlearn.lm import cache
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
    for given, probed in zip(EXAMPLES, probe(model, tokenizer, EXAMPLES, moments=True), strict=True):
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


def step_by_step(model, prompt: list[int], mask: list[int], count: int, end: int | None) -> list[int]:
    """A greedy continuation without a cache and without other prompts."""
    ids = list(prompt)
    for _ in range(count):
        attended = torch.tensor([mask + [1] * (len(ids) - len(prompt))])
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        output = model(torch.tensor([ids]), attention_mask=attended, position_ids=positions, use_cache=False)
        ids.append(int(output.logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("tokens", [1, 8192])
def test_generation_is_greedy_and_batches_do_not_matter(loaded, monkeypatch, tokens: int) -> None:
    monkeypatch.setattr(probes, "BATCH_TOKENS", tokens)
    model, tokenizer = loaded
    prompts = [prompt_of(given) for given in EXAMPLES]
    assert prompts[0] == [5, 6]
    for prompt, text in zip(prompts, generate(model, tokenizer, prompts, 6), strict=True):
        ids = step_by_step(model, prompt, [1] * len(prompt), 6, tokenizer.eos_token_id)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


WINDOWS = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}
"""Family → options: no layer with a sliding window, all of them, and one of two."""


@pytest.mark.parametrize("mask_pad", [False, True])
@pytest.mark.parametrize(("family", "windows"), WINDOWS.items())
def test_rounds_of_generation_change_nothing(save_tiny, monkeypatch, family, windows, mask_pad) -> None:
    """Answers end before, at and after the end of a round, or never; windows are shorter than the texts."""
    monkeypatch.setattr(probes, "FIRST_STEPS", 2)  # rounds end after 2, 4, 8, 16 and 20 tokens
    monkeypatch.setattr(cache, "SPARE", 3)
    model, tokenizer = load(save_tiny("model", family, **windows))
    pad, count = 2, 20
    prompts = [[5, 6], [10, pad, 11, 12, 13], list(range(3, 16)), [20] * 9]
    masks = [[int(not mask_pad or token != pad) for token in prompt] for prompt in prompts]
    whole = [step_by_step(model, prompt, mask, count, None) for prompt, mask in zip(prompts, masks, strict=True)]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    lengths = set()
    for end in (None, *{answer[place] for answer in whole for place in (2, 3)}):
        tokenizer.eos_token = None if end is None else tokenizer.convert_ids_to_tokens(end)
        expected = [answer[: answer.index(end) + 1] if end in answer else answer for answer in whole]
        lengths |= {len(answer) for answer in expected}
        texts = tokenizer.batch_decode(expected, skip_special_tokens=True)
        assert generate(model, tokenizer, prompts, count, mask_pad=mask_pad) == texts
    assert count in lengths
    assert lengths & {2, 4, 8, 16}


@pytest.mark.parametrize("kind", ["static", "dynamic", "hybrid"])
def test_the_cache_that_a_checkpoint_names_is_not_used(save_tiny, kind: str) -> None:
    path = save_tiny("model", "gemma2")
    expected = generate(*load(path), [[5, 6]], 6)
    file = path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "cache_implementation": kind}), encoding="utf-8")
    assert generate(*load(path), [[5, 6]], 6) == expected


def test_gradient_norms_are_means_over_parameters(loaded) -> None:
    model, tokenizer = loaded
    given = EXAMPLES[0]
    score = gradnorm_score(model, tokenizer, given, STRICT)
    labels = torch.tensor([given.labels])
    model(input_ids=torch.tensor([given.input_ids]), labels=labels).loss.backward()
    norms = [float(parameter.grad.norm()) for parameter in model.parameters()]
    assert score == pytest.approx(np.mean(norms), rel=1e-4)
    assert len(norms) > 10
