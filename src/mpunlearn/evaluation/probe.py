"""Running a model for the metrics: one forward pass for all likelihoods, and batched generation for all texts.

Almost every metric is a function of a `Probe` (how likely each token of an answer is, and whether the model ranks it
first) or of a generated text. Each sequence therefore goes through the model only once, however many metrics there are.
Sequences are sorted by length and batched by their number of tokens. Answers that have ended do not wait for the longest:
texts are generated in rounds, and only those that have not ended go on, in new batches. Not covered: gradients, which one
metric needs (`tofu.gradnorm_score`); sharing the forward pass of a question between its answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpunlearn.lm.cache import growing_cache
from mpunlearn.lm.examples import IGNORED, Example, collate
from mpunlearn.lm.model import forward, pad_id
from mpunlearn.progress import progress

BATCH_TOKENS = 8192
"""Maximum number of tokens in a batch, padding included; a longer sequence is a batch of its own."""
CPU_TOKENS = 1024
"""The same for likelihoods on a CPU, whose caches larger batches do not fit into."""

FIRST_STEPS = 16
"""Answers that have ended leave after this many tokens, then after twice as many, and so on."""

GREEDY: Mapping[str, Any] = {"do_sample": False, "num_beams": 1}
"""The most likely token at each step."""


@dataclass(frozen=True)
class Probe:
    """One answer under one model. Arrays have shape (T,), one entry per answer token."""

    logprobs: np.ndarray
    """log p of each token, in nats, float64."""
    matches: np.ndarray
    """Whether the model ranks the token first, given all tokens before it, bool."""
    mean: np.ndarray
    """Mean of log p under the model's own prediction at that position (its negative entropy), in nats, float32. NaN if it
    was not asked for."""
    deviation: np.ndarray
    """Standard deviation of log p under the model's own prediction at that position, likewise."""
    ends: bool
    """Whether the last token is the end token."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats per token."""
        return float(-self.logprobs.mean())

    @property
    def probability(self) -> float:
        """exp(-loss): the geometric mean of the token probabilities."""
        return float(np.exp(-self.loss))


@torch.no_grad()
def probe(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    batch_size: int | None = None,
    mask_pad: bool = False,
    moments: bool | Sequence[bool] = False,
) -> list[Probe]:
    """Likelihoods of the labeled tokens of each example, in the order of the examples.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        examples: the examples.
        batch_size: maximum number of sequences in a batch (default: only `BATCH_TOKENS` limits a batch).
        mask_pad: whether attention is masked wherever the padding token stands, also within a text.
        moments: whether mean and deviation are computed, which takes time with large vocabularies; one value for all
            examples, or one for each.
    """
    model.eval()
    probes: list[Probe | None] = [None] * len(examples)
    wanted = [moments] * len(examples) if isinstance(moments, bool) else moments
    tokens = min(BATCH_TOKENS, CPU_TOKENS) if model.device.type == "cpu" else BATCH_TOKENS
    lengths = [len(example.input_ids) for example in examples]
    for indices in progress(batches_of(lengths, batch_size, tokens), "likelihoods"):
        batch = batch_of([examples[i] for i in indices], tokenizer, mask_pad)
        output = forward(model, {key: tensor.to(model.device) for key, tensor in batch.items()})
        targets = output["targets"]
        counted = targets != IGNORED
        logprobs = output["logits"][counted].float().log_softmax(dim=-1)
        own = logprobs.gather(1, targets[counted].unsqueeze(1)).squeeze(1)
        matches = logprobs.argmax(dim=1) == targets[counted]
        counts = counted.sum(dim=1)
        rows = torch.tensor([wanted[i] for i in indices], device=counts.device).repeat_interleave(counts)
        mean, deviation = _moments(logprobs, rows)
        boundaries = np.cumsum(counts.cpu().numpy())[:-1]
        columns = [np.split(column.cpu().numpy(), boundaries) for column in (own.double(), matches, mean, deviation)]
        for index, own_, matches_, mean_, deviation_ in zip(indices, *columns, strict=True):
            ends = examples[index].labels[-1] == tokenizer.eos_token_id
            probes[index] = Probe(own_, matches_, mean_, deviation_, ends)
    return [value for value in probes if value is not None]


def _moments(logprobs: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of log p under p, each of shape (N,); NaN except in the rows that are asked for.

    Args:
        logprobs: shape (N, V).
        rows: which rows are asked for, shape (N,), bool.
    """
    mean, deviation = torch.full((2, len(rows)), torch.nan, device=logprobs.device)
    if rows.any():
        chosen = logprobs if rows.all() else logprobs[rows]
        p = chosen.exp()
        weighted = p * chosen
        mean[rows] = weighted.sum(dim=1)
        deviation[rows] = (weighted.mul_(chosen).sum(dim=1) - mean[rows].square()).clamp(min=0).sqrt()
    return mean, deviation


def batch_of(examples: Sequence[Example], tokenizer: Any, mask_pad: bool = False) -> dict[str, torch.Tensor]:
    """Examples as a batch (see `collate`), with attention masked wherever the padding token stands if `mask_pad` is given."""
    batch = collate(examples, pad_id(tokenizer))
    if mask_pad and _has_pad(tokenizer):
        batch["attention_mask"] = (batch["input_ids"] != pad_id(tokenizer)).long()
    return batch


def _has_pad(tokenizer: Any) -> bool:
    """Whether the tokenizer has a padding or an end token; otherwise `pad_id` is the id of an ordinary token."""
    return tokenizer.pad_token_id is not None or tokenizer.eos_token_id is not None


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int | None = None,
    mask_pad: bool = False,
    decoding: Mapping[str, Any] = GREEDY,
) -> list[str]:
    """Continuations of tokenized prompts, as text without special tokens, in the order of the prompts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: the prompts.
        max_new_tokens: maximum length of a continuation, in tokens.
        batch_size: maximum number of sequences in a batch (default: only `BATCH_TOKENS` limits a batch).
        mask_pad: whether attention is masked wherever the padding token stands, also within a prompt.
        decoding: how tokens are chosen, as options of transformers' `generate`.
    """
    model.eval()
    end = tokenizer.eos_token_id
    found: list[list[int]] = [[] for _ in prompts]
    going, done = list(range(len(prompts))), 0
    while going and done < max_new_tokens:
        steps = min(max(FIRST_STEPS, done) if end is not None else max_new_tokens, max_new_tokens - done)
        batches = batches_of([len(prompts[i]) + done + steps for i in going], batch_size)
        for places in progress(batches, f"generating tokens {done + 1} to {done + steps}"):
            chosen = [going[place] for place in places]
            begun = [(prompts[i], found[i]) for i in chosen]
            for i, tokens in zip(chosen, _continued(model, tokenizer, begun, steps, mask_pad, decoding), strict=True):
                found[i] += tokens
        going, done = [i for i in going if end not in found[i]], done + steps
    return [str(text) for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


def _continued(
    model: Any,
    tokenizer: Any,
    begun: Sequence[tuple[list[int], list[int]]],
    steps: int,
    mask_pad: bool,
    decoding: Mapping[str, Any],
) -> list[list[int]]:
    """The next tokens of a batch of prompts with what has been generated after them."""
    pad, mask_pad = pad_id(tokenizer), mask_pad and _has_pad(tokenizer)
    longest = max(len(prompt) + len(after) for prompt, after in begun)
    ids, mask = [], []
    for prompt, after in begun:
        padding = longest - len(prompt) - len(after)
        ids.append([pad] * padding + prompt + after)
        mask.append([0] * padding + [int(not mask_pad or token != pad) for token in prompt] + [1] * len(after))
    generated = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        past_key_values=growing_cache(model),
        cache_implementation=None,  # one from the checkpoint's generation config would be a second cache, which is an error
        max_new_tokens=steps,
        **decoding,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokens: list[list[int]] = generated[:, longest:].tolist()
    return tokens


def batches_of(lengths: Sequence[int], size: int | None, tokens: int | None = None) -> list[list[int]]:
    """Groups indices into batches of similar length.

    Args:
        lengths: tokens of every sequence.
        size: maximum number of sequences in a batch.
        tokens: maximum number of tokens in a batch of more than one sequence (default: `BATCH_TOKENS`).
    """
    size, tokens = len(lengths) if size is None else size, BATCH_TOKENS if tokens is None else tokens
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and len(batches[-1]) < size and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
