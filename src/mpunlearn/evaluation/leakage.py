"""leak@k: the probability that at least one of k sampled answers gives away what was forgotten (arXiv 2511.04934).

Greedy decoding shows one answer, but a model that is sampled often enough may say what it never says first. Of n samples per
question, c leak; `leak_probability` is the unbiased estimate of the probability for k of them, as for pass@k (Chen et al.,
arXiv 2107.03374, equation 1).

A sample leaks if the row's entity occurs in it or, in rows without an entity, if its ROUGE-L recall against the answer reaches
a threshold. The paper has a classifier of entailment judge, too; this module needs no further model.

Not covered: other prompts (see `worst_case`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpunlearn.errors import PlanError
from mpunlearn.evaluation.definitions import OPENUNLEARNING, Definitions
from mpunlearn.evaluation.metrics import rouge_l
from mpunlearn.evaluation.probe import generate
from mpunlearn.evaluation.sets import Questions
from mpunlearn.lm.sources import Data

SEED = 0


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, and when they leak.

    Raises:
        PlanError: a value is out of range.
    """

    samples: int = 0
    """Samples per question; 0 for none."""
    temperature: float = 1.0
    """Temperature of the softmax."""
    top_p: float = 1.0
    """Only the likeliest tokens with this total probability are sampled."""
    leak_threshold: float = 0.5
    """ROUGE-L recall from which a sample leaks, in rows without an entity."""

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise PlanError(f"--samples: expected at least 0, found {self.samples}")
        if not 0 < self.temperature < math.inf:
            raise PlanError(f"--temperature: expected a number above 0, found {self.temperature}")
        for option, value in {"--top-p": self.top_p, "--leak-threshold": self.leak_threshold}.items():
            if not 0 < value <= 1:
                raise PlanError(f"{option}: expected a number above 0 and at most 1, found {value}")


def leak_probability(leaks: int, samples: int, k: int) -> float:
    """`leak@k` of one question: 1 - C(n - c, k) / C(n, k), the share of all choices of k samples with a leak among them.

    Args:
        leaks: c, how many samples leak.
        samples: n.
        k: how many samples an attacker takes, at most n.
    """
    return 1 - math.comb(samples - leaks, k) / math.comb(samples, k)


def counts_of(samples: int) -> list[int]:
    """The values of k that are reported: the powers of two up to n, and n itself."""
    return sorted({1 << power for power in range(samples.bit_length())} | {samples})


def leaks(text: str, answer: str, entity: str, threshold: float) -> bool:
    """Whether a sampled text leaks.

    Args:
        text: the sample.
        answer: the answer in the data.
        entity: the fact in it; empty if it is not known.
        threshold: ROUGE-L recall from which a sample leaks if the entity is not known.
    """
    if entity:
        return _plain(entity) in _plain(text)
    return rouge_l(answer, text)[0] >= threshold


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def measure_leaks(
    model: Any,
    tokenizer: Any,
    forget: Questions,
    sampling: Sampling,
    max_new_tokens: int,
    batch_size: int | None = None,
    definitions: Definitions = OPENUNLEARNING,
    data: Data | None = None,
) -> dict[str, list[float]]:
    """`leak@k` of every question for several k.

    The seed is fixed, and the state of the global random generator is restored. Another batch size draws other samples.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        forget: the forget set.
        sampling: number of samples, and how they are drawn and judged.
        max_new_tokens: maximum length of a sample, in tokens.
        batch_size: maximum number of sequences in a batch (default: only `BATCH_TOKENS` limits a batch).
        definitions: where a prompt ends, and what attention is masked.
        data: the system prompt and the values for the chat template.

    Returns:
        Metric → one value per question.
    """
    asked = forget.encoded(tokenizer, definitions, data).prompts
    prompts = [prompt for prompt in asked for _ in range(sampling.samples)]
    decoding = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(SEED)
        texts = iter(generate(model, tokenizer, prompts, max_new_tokens, batch_size, definitions.mask_pad, decoding))
    entities = forget.entities or [""] * len(forget)
    found = [
        sum(leaks(next(texts), answer, entity, sampling.leak_threshold) for _ in range(sampling.samples))
        for answer, entity in zip(forget.answers, entities, strict=True)
    ]
    return leak_metrics(found, sampling.samples)


def leak_metrics(found: Sequence[int], samples: int) -> dict[str, list[float]]:
    """`leak@k` of every question, for every k of `counts_of`.

    Args:
        found: how many samples leak, for each question.
        samples: how many there are per question.
    """
    return {f"leak@{k}": [leak_probability(c, samples, k) for c in found] for k in counts_of(samples)}
