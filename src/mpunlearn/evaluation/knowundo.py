"""KnowUnDo (Tian et al., arXiv 2407.01920): does a model forget what it must, and still know what it may?

The benchmark asks about authors (`knowundo/privacy`) and books (`knowundo/copyright`). Its unlearn scope is what the law
lets a person or an owner take back, and its retention scope what everyone may know. Each has questions for evaluation (the
column val).

The prompt is that of the authors' code (github.com/zjunlp/KnowUnDo, run_eval_lora.py and save_tokenized_dataset.py): the
question, an empty line, and the answer, without a chat template and without an end token, cut off after 256 tokens. Success
and perplexity are computed as there, from the likelihoods of the given answer. ROUGE-L is ours: the recall of a greedily
generated answer, while the paper does not say how it is computed.

Not covered: the authors' prompts that tell the model to be careful, and their general tasks (`evaluate --tasks
mmlu,arc_challenge,truthfulqa_mc1,siqa,race`).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpunlearn.errors import DataError
from mpunlearn.evaluation import metrics
from mpunlearn.evaluation.bootstrap import EVERYTHING, Sample
from mpunlearn.evaluation.probe import generate, probe
from mpunlearn.evaluation.prompts import continued
from mpunlearn.evaluation.tofu import PerExample
from mpunlearn.lm.examples import Example, tokenized
from mpunlearn.lm.sources import Data, read_rows

BENCHMARKS = ("knowundo/privacy", "knowundo/copyright")
SCOPES = {"forget": "unlearn", "retain": "retention"}
"""Set → the benchmark's name for it."""
MAX_TOKENS = 256


@dataclass(frozen=True)
class KnowUnDoSets:
    """The questions with answers of one domain, by set: forget and retain."""

    pairs: dict[str, list[tuple[str, str]]]


def read(benchmark: str, data: Data) -> KnowUnDoSets:
    """Reads one of the `BENCHMARKS`.

    Args:
        benchmark: its name.
        data: where local mirrors are.

    Raises:
        DataError: a scope cannot be read, or lacks a question or an answer.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for name, scope in SCOPES.items():
        source = f"{benchmark}/{scope}/val"
        pairs[name] = []
        for where, row in read_rows(source, data):
            question, answer = row["question"], row["answer"]
            if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
                raise DataError(f"{where}: expected text and labels that are texts, found {row!r:.100}")
            pairs[name].append((question, answer))
        if not pairs[name]:
            raise DataError(f"{source}: contains no examples")
    return KnowUnDoSets(pairs)


def measure(model: Any, tokenizer: Any, sets: KnowUnDoSets, batch_size: int | None = None) -> PerExample:
    """The values for every example: `acc`, the share of answer tokens ranked first; `loss`, in nats per token; `ROUGE`.

    If the question alone fills the 256 tokens, `acc` and `loss` are NaN and do not count, as in the authors' code.
    """
    per_example: PerExample = {}
    for name, pairs in sets.pairs.items():
        examples = [continued(tokenizer, question, f"\n\n{answer}") for question, answer in pairs]
        cut = [Example(example.input_ids[:MAX_TOKENS], example.labels[:MAX_TOKENS]) for example in examples]
        left = [number for number, example in enumerate(cut) if example.tokens]
        probes = dict(zip(left, probe(model, tokenizer, [cut[number] for number in left], batch_size), strict=True))
        found = [probes.get(number) for number in range(len(cut))]
        prompts = [tokenized(tokenizer, f"{question}\n\n", name)["input_ids"] for question, _ in pairs]
        generated = generate(model, tokenizer, prompts, MAX_TOKENS, batch_size)
        answers = [answer for _, answer in pairs]
        per_example[name] = {
            "acc": [math.nan if value is None else float(np.mean(value.matches)) for value in found],
            "loss": [math.nan if value is None else value.loss for value in found],
            "ROUGE": [metrics.rouge_l(*pair)[0] for pair in zip(answers, generated, strict=True)],
        }
    return per_example


def summarize(per_example: PerExample, sample: Sample = EVERYTHING) -> dict[str, Any]:
    """KnowUnDo's metrics, by name, from what `measure` returned.

    `unlearn_success` is 1 minus the mean of `acc` over the unlearn scope, `retention_success` that mean over the retention
    scope, and `success` the mean of the two (equations 3 and 4, between 0 and 1). `…_PPL` is exp of the mean loss.
    Numbers or, for resamples, arrays of shape (B,).
    """
    success = {
        "unlearn_success": 1 - sample.mean_of_defined("forget", per_example["forget"]["acc"]),
        "retention_success": sample.mean_of_defined("retain", per_example["retain"]["acc"]),
    }
    result = {**success, "success": sum(success.values()) / 2}
    for name in SCOPES:
        with np.errstate(over="ignore"):
            result[f"{name}_PPL"] = np.exp(sample.mean_of_defined(name, per_example[name]["loss"]))
        result[f"{name}_ROUGE"] = sample.mean(name, per_example[name]["ROUGE"])
    return {metric: float(value) if np.ndim(value) == 0 else value for metric, value in result.items()}
