"""TOFU's metrics, memorization and membership inference on a benchmark's sets.

Nine numbers make model utility, the truth ratios against a retrained model's make forget quality (arXiv 2401.06121, section
2.2); memorization and membership are OpenUnlearning's (arXiv 2506.12618).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from mpunlearn.evaluation import metrics
from mpunlearn.evaluation.probe import Probe, generate, probe, prompt_of
from mpunlearn.evaluation.sets import KEPT, OPTIONS, Encoded, Questions
from mpunlearn.lm.examples import Example, collate
from mpunlearn.lm.losses import token_nll
from mpunlearn.lm.model import forward, pad_id
from mpunlearn.progress import progress

PerExample = dict[str, dict[str, list[float]]]
"""Set → metric → a value per example."""


def measure(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Questions],
    *,
    max_new_tokens: int = 200,
    reference: Any | None = None,
    texts: bool = True,
    membership: bool = True,
) -> PerExample:
    """Everything that one model says about every example.

    Args:
        sets: the benchmark; membership inference needs a holdout set.
        max_new_tokens: length of generated answers.
        reference: a model that never saw the forget set, for the membership score of that name.
        texts: whether answers are generated, for ROUGE.
        membership: whether membership scores are computed.
    """
    encoded = {name: questions.encoded(tokenizer) for name, questions in sets.items()}
    probes = iter(probe(model, tokenizer, [example for one in encoded.values() for example in _flat(one)]))
    found: PerExample = {}
    answers: dict[str, list[Probe]] = {}
    for name, one in encoded.items():
        answers[name] = [next(probes) for _ in one.answers]
        shared = one.paraphrases is one.answers
        correct = answers[name] if shared else [next(probes) for _ in one.paraphrases]
        wrong = [[next(probes) for _ in options] for options in one.wrong]
        values: dict[str, list[float]] = {"loss": [answer.loss for answer in answers[name]]}
        if any(wrong):
            values["truth_ratio"] = [metrics.truth_ratio(*pair) for pair in zip(correct, wrong, strict=True)]
        if name in OPTIONS:
            pairs = zip(answers[name], wrong, strict=True)
            values["probability"] = [metrics.normalized_probability(*pair) for pair in pairs]
        else:
            values["probability"] = [answer.probability for answer in answers[name]]
        if name == "forget":
            values["exact_memorization"] = [metrics.exact_memorization(answer) for answer in answers[name]]
            values["extraction_strength"] = [metrics.extraction_strength(answer) for answer in answers[name]]
        found[name] = values
    if texts:
        written = [name for name in sets if name != "holdout"]
        prompts = [prompt_of(example) for name in written for example in encoded[name].answers]
        said = iter(generate(model, tokenizer, prompts, max_new_tokens))
        for name in written:
            scores = [metrics.rouge_l(answer, next(said)) for answer in sets[name].answers]
            found[name]["rouge_l_recall"] = [recall for recall, _ in scores]
    if membership and "holdout" in sets:
        for name in ("forget", "holdout"):
            attacks = membership_scores(
                model, tokenizer, encoded[name].answers, answers[name], sets[name].answers, reference
            )
            found[name] |= {f"mia_{attack}": values for attack, values in attacks.items()}
    return found


def _flat(one: Encoded) -> list[Example]:
    paraphrases = [] if one.paraphrases is one.answers else one.paraphrases
    return [*one.answers, *paraphrases, *(example for options in one.wrong for example in options)]


def membership_scores(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    answers: list[Probe],
    texts: list[str],
    reference: Any | None,
) -> dict[str, list[float]]:
    """Every membership score of every example; the lower, the more a member."""
    found = {
        "loss": [metrics.loss_score(answer) for answer in answers],
        "zlib": [metrics.zlib_score(answer, text) for answer, text in zip(answers, texts, strict=True)],
        "min_k": [metrics.min_k_score(answer) for answer in answers],
        "min_k++": [metrics.min_k_plus_score(answer) for answer in answers],
        "gradient_norm": [gradient_norm(model, tokenizer, example) for example in progress(examples, "gradients")],
    }
    if reference is not None:
        others = probe(reference, tokenizer, examples)
        found["reference"] = [
            metrics.reference_score(answer, other) for answer, other in zip(answers, others, strict=True)
        ]
    return found


def gradient_norm(model: Any, tokenizer: Any, example: Example) -> float:
    """Membership score *gradient norm*: mean over parameters of the 2-norm of the loss's gradient (arXiv 2402.17012)."""
    model.eval()
    model.zero_grad()
    batch = {key: tensor.to(model.device) for key, tensor in collate([example], pad_id(tokenizer)).items()}
    given = forward(model, batch)
    torch.autograd.backward(token_nll(given["logits"], given["targets"]).sum() / example.tokens)
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return sum(norms) / len(norms)


def summarize(found: PerExample, retrained: PerExample | None = None) -> dict[str, float]:
    """The benchmark's metrics by name.

    Args:
        found: what `measure` gave for the model.
        retrained: the same for the model that never saw the forget set; forget quality and PrivLeak need it.
    """
    result: dict[str, float] = {}
    utility: list[float] = []
    for name, values in found.items():
        if name == "holdout":
            continue
        # Probability, ROUGE-L and truth ratio of the set, in this order, as far as they were measured.
        result[f"{name}_probability"] = float(np.mean(values["probability"]))
        if "rouge_l_recall" in values:
            result[f"{name}_rouge_l_recall"] = float(np.mean(values["rouge_l_recall"]))
        if "truth_ratio" in values:
            ratios = np.array(values["truth_ratio"])
            aggregate: Callable[[np.ndarray], float] = (
                metrics.truth_ratio_forget if name == "forget" else metrics.truth_ratio_retain
            )
            result[f"{name}_truth_ratio"] = aggregate(ratios)
        if name in KEPT:
            parts = ("probability", "rouge_l_recall", "truth_ratio")
            utility += [result[f"{name}_{part}"] for part in parts if f"{name}_{part}" in result]
    if utility:
        result["model_utility"] = metrics.model_utility(utility)
    for metric in ("exact_memorization", "extraction_strength"):
        result[metric] = float(np.mean(found["forget"][metric]))
    if retrained is not None and "truth_ratio" in found["forget"]:
        own, other = (np.array(values["forget"]["truth_ratio"]) for values in (found, retrained))
        result["forget_quality"] = metrics.forget_quality(own, other)
    for attack in sorted(name for name in found.get("holdout", {}) if name.startswith("mia_")):
        result[attack] = _auc(found, attack)
    if retrained is not None and "mia_min_k" in result and "mia_min_k" in retrained.get("holdout", {}):
        result["privacy_leak"] = metrics.privacy_leak(result["mia_min_k"], _auc(retrained, "mia_min_k"))
    return result


def _auc(found: PerExample, attack: str) -> float:
    return metrics.auc(np.array(found["forget"][attack]), np.array(found["holdout"][attack]))
