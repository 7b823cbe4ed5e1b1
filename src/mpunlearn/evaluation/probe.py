"""What a model makes of answers: one forward pass for all likelihoods, one batched generation for all texts.

Every metric here is a function of a `Probe` (how likely each token of an answer is, and whether the model would have said it)
or of a generated text, so each sequence goes through the model once however many metrics there are. Sequences are sorted by
length and batched by their number of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpunlearn.lm.examples import IGNORED, Example, collate
from mpunlearn.lm.model import forward, pad_id
from mpunlearn.progress import bar

BATCH_TOKENS = 8192
"""Padded tokens of a batch."""


@dataclass(frozen=True)
class Probe:
    """One answer under one model; arrays have one entry per answer token."""

    logprobs: np.ndarray
    """log p of each token, nats, float64."""
    matches: np.ndarray
    """Whether the token is the most likely one, given all before it."""
    mean: np.ndarray
    """Expected log p under the model's own prediction: minus its entropy, nats."""
    deviation: np.ndarray
    """Standard deviation of log p under the model's own prediction, nats."""
    ends: bool
    """Whether the last token is the end of the text."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats per token."""
        return float(-self.logprobs.mean())

    @property
    def probability(self) -> float:
        """exp(-loss)."""
        return float(np.exp(-self.loss))


@torch.no_grad()
def probe(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[Probe]:
    """Likelihoods of the examples' labeled tokens, in the examples' order."""
    model.eval()
    found: list[Probe | None] = [None] * len(examples)
    progress = bar(len(examples), "likelihoods")
    for indices in _batches([len(example.input_ids) for example in examples]):
        batch = collate([examples[i] for i in indices], pad_id(tokenizer))
        given = forward(model, {key: tensor.to(model.device) for key, tensor in batch.items()})
        targets = given["targets"]
        counted = targets != IGNORED
        logprobs = given["logits"][counted].float().log_softmax(dim=-1)
        own = logprobs.gather(1, targets[counted].unsqueeze(1)).squeeze(1)
        p = logprobs.exp()
        mean = (p * logprobs).sum(dim=1)
        deviation = ((p * logprobs.square()).sum(dim=1) - mean.square()).clamp(min=0).sqrt()
        matches = logprobs.argmax(dim=1) == targets[counted]
        ends = np.cumsum(counted.sum(dim=1).cpu().numpy())[:-1]
        columns = [np.split(column.cpu().numpy(), ends) for column in (own.double(), matches, mean, deviation)]
        for index, own_, matches_, mean_, deviation_ in zip(indices, *columns, strict=True):
            ends_ = examples[index].labels[-1] == tokenizer.eos_token_id
            found[index] = Probe(own_, matches_, mean_, deviation_, ends_)
        progress.update(len(indices))
    progress.close()
    return [value for value in found if value is not None]


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuations of token sequences, as text, in the prompts' order."""
    model.eval()
    found = [""] * len(prompts)
    progress = bar(len(prompts), "generating answers")
    pad = pad_id(tokenizer)
    for indices in _batches([len(prompt) + max_new_tokens for prompt in prompts]):
        longest = max(len(prompts[i]) for i in indices)
        rows = [[pad] * (longest - len(prompts[i])) + prompts[i] for i in indices]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in indices]
        generated = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            found[index] = text
        progress.update(len(indices))
    progress.close()
    return found


def prompt_of(example: Example) -> list[int]:
    """The tokens before the answer."""
    first = next(i for i, label in enumerate(example.labels) if label != IGNORED)
    return example.input_ids[:first]


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in batches of similar length, of at most `BATCH_TOKENS` padded tokens or one sequence."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
