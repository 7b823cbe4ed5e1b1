"""Running a model for the metrics: one forward pass for all likelihoods, and batched generation for all texts.

Almost every metric is a function of a `Probe` (how likely each token of an answer is, and whether the model ranks it
first) or of a generated text. Each sequence therefore goes through the model only once, however many metrics there are.
Sequences are sorted by length and batched by their number of tokens. Not covered: gradients, which one metric needs
(`tofu.gradnorm_score`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpunlearn.lm.examples import IGNORED, Example, collate
from mpunlearn.lm.model import forward, pad_id
from mpunlearn.progress import progress

BATCH_TOKENS = 8192
"""Maximum number of tokens in a batch, padding included; a longer sequence is a batch of its own."""

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
    """Mean of log p under the model's own prediction at that position (its negative entropy), in nats, float32."""
    deviation: np.ndarray
    """Standard deviation of log p under the model's own prediction at that position, in nats, float32."""
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
    model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int | None = None, mask_pad: bool = False
) -> list[Probe]:
    """Likelihoods of the labeled tokens of each example, in the order of the examples.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        examples: the examples.
        batch_size: maximum number of sequences in a batch (default: only `BATCH_TOKENS` limits a batch).
        mask_pad: whether attention is masked wherever the padding token stands, also within a text.
    """
    model.eval()
    probes: list[Probe | None] = [None] * len(examples)
    for indices in progress(batches_of([len(example.input_ids) for example in examples], batch_size), "likelihoods"):
        batch = batch_of([examples[i] for i in indices], tokenizer, mask_pad)
        output = forward(model, {key: tensor.to(model.device) for key, tensor in batch.items()})
        targets = output["targets"]
        counted = targets != IGNORED
        logprobs = output["logits"][counted].float().log_softmax(dim=-1)
        own = logprobs.gather(1, targets[counted].unsqueeze(1)).squeeze(1)
        p = logprobs.exp()
        mean = (p * logprobs).sum(dim=1)
        deviation = ((p * logprobs.square()).sum(dim=1) - mean.square()).clamp(min=0).sqrt()
        matches = logprobs.argmax(dim=1) == targets[counted]
        boundaries = np.cumsum(counted.sum(dim=1).cpu().numpy())[:-1]
        columns = [np.split(column.cpu().numpy(), boundaries) for column in (own.double(), matches, mean, deviation)]
        for index, own_, matches_, mean_, deviation_ in zip(indices, *columns, strict=True):
            ends = examples[index].labels[-1] == tokenizer.eos_token_id
            probes[index] = Probe(own_, matches_, mean_, deviation_, ends)
    return [value for value in probes if value is not None]


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
    texts = [""] * len(prompts)
    pad, mask_pad = pad_id(tokenizer), mask_pad and _has_pad(tokenizer)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for indices in progress(batches_of(lengths, batch_size), "generating answers"):
        longest = max(len(prompts[i]) for i in indices)
        rows = [[pad] * (longest - len(prompts[i])) + prompts[i] for i in indices]
        seen = [[int(not mask_pad or token != pad) for token in prompts[i]] for i in indices]
        mask = [[0] * (longest - len(row)) + row for row in seen]
        generated = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            **decoding,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        decoded = tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
        for index, text in zip(indices, decoded, strict=True):
            texts[index] = text
    return texts


def batches_of(lengths: Sequence[int], size: int | None) -> list[list[int]]:
    """Groups indices into batches of similar length, each with at most `BATCH_TOKENS` tokens or a single sequence."""
    size = len(lengths) if size is None else size
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and len(batches[-1]) < size and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
