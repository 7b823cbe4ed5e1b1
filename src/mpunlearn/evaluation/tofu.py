"""TOFU's metrics, memorization and membership inference on the question sets of a benchmark.

`measure` runs a model and returns one value per example; `summarize` turns these values into the benchmark's metrics.
They are separate because forget quality and PrivLeak compare two models, and the values of each model are cached.

Model utility combines probability, ROUGE-L recall and truth ratio of three sets. Forget quality compares the forget
set's truth ratios under the two models (arXiv 2401.06121, section 2.2). The metrics of memorization and membership
inference, and all names, are OpenUnlearning's (arXiv 2506.12618). Not covered: its gibberish classifier, and ROUGE
against paraphrases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mpunlearn.evaluation import metrics
from mpunlearn.evaluation.definitions import OPENUNLEARNING, Definitions
from mpunlearn.evaluation.probe import Probe, batch_of, generate, probe
from mpunlearn.evaluation.prompts import answer_text
from mpunlearn.evaluation.sets import OPTION_SETS, UTILITY_SETS, Encoded, Questions
from mpunlearn.lm.examples import IGNORED, Example
from mpunlearn.lm.losses import token_nll
from mpunlearn.lm.model import forward
from mpunlearn.lm.sources import Data
from mpunlearn.progress import progress

PREFIXES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
"""Set → prefix of its metrics in OpenUnlearning: for retain, the mean of Q_A_Prob is called retain_Q_A_Prob."""
PerExample = dict[str, dict[str, list[float]]]
"""Set → metric → one value per example."""


def measure(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Questions],
    *,
    max_new_tokens: int = 200,
    reference: Any | None = None,
    texts: bool = True,
    membership: bool = True,
    batch_size: int | None = None,
    definitions: Definitions = OPENUNLEARNING,
    data: Data | None = None,
) -> PerExample:
    """The values for every example under one model.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        sets: the question sets by name. Membership inference needs a holdout set.
        max_new_tokens: maximum length of generated answers, in tokens.
        reference: a model that never saw the forget set, for `mia_reference`.
        texts: whether to generate answers, for ROUGE.
        membership: whether to compute membership scores.
        batch_size: maximum number of sequences in a batch (default: only `BATCH_TOKENS` limits a batch).
        definitions: which definitions of the metrics.
        data: the system prompt and the values for the chat template.

    Returns:
        For each set the loss (nats per token), `Q_A_Prob` or `Q_A_Prob_normalised`, `Q_A_ROUGE` and `Truth_Ratio`; for
        the forget set also the memorization metrics; for the forget and the holdout set also the membership scores.
    """
    encoded = {name: questions.encoded(tokenizer, definitions, data) for name, questions in sets.items()}
    mask_pad = definitions.mask_pad
    examples = [example for tokenized in encoded.values() for example in _all_examples(tokenized)]
    probes = iter(probe(model, tokenizer, examples, batch_size, mask_pad))
    per_example: PerExample = {}
    answers: dict[str, list[Probe]] = {}
    for name, tokenized in encoded.items():
        answers[name] = [next(probes) for _ in tokenized.answers]
        shared = tokenized.paraphrases is tokenized.answers
        correct = answers[name] if shared else [next(probes) for _ in tokenized.paraphrases]
        wrong = [[next(probes) for _ in options] for options in tokenized.wrong]
        values: dict[str, list[float]] = {"loss": [answer.loss for answer in answers[name]]}
        if any(wrong):
            values["Truth_Ratio"] = [
                metrics.truth_ratio(*pair, definitions) for pair in zip(correct, wrong, strict=True)
            ]
        if name in OPTION_SETS:
            pairs = zip(answers[name], wrong, strict=True)
            values[_probability(name)] = [metrics.normalized_probability(*pair, definitions) for pair in pairs]
        else:
            values[_probability(name)] = [answer.probability for answer in answers[name]]
        if name == "forget":
            values["exact_memorization"] = [metrics.exact_memorization(a, definitions) for a in answers[name]]
            values["extraction_strength"] = [metrics.extraction_strength(a, definitions) for a in answers[name]]
        per_example[name] = values
    if texts:
        names = [name for name in sets if name != "holdout"]
        prompts = [prompt for name in names for prompt in encoded[name].prompts]
        generated = iter(generate(model, tokenizer, prompts, max_new_tokens, batch_size, mask_pad))
        for name in names:
            scores = [metrics.rouge_l(answer, next(generated)) for answer in sets[name].answers]
            per_example[name]["Q_A_ROUGE"] = [recall for recall, _ in scores]
    if membership and "holdout" in sets:
        for name in ("forget", "holdout"):
            examples, written = encoded[name].answers, sets[name].answers
            if definitions.prompt_alone:
                written = [answer_text(example, tokenizer) for example in examples]
            per_example[name] |= membership_scores(
                model, tokenizer, examples, answers[name], written, reference, batch_size, definitions
            )
    return per_example


def _probability(name: str) -> str:
    """The name of a set's probability metric."""
    return "Q_A_Prob_normalised" if name in OPTION_SETS else "Q_A_Prob"


def _all_examples(encoded: Encoded) -> list[Example]:
    paraphrases = [] if encoded.paraphrases is encoded.answers else encoded.paraphrases
    return [*encoded.answers, *paraphrases, *(example for options in encoded.wrong for example in options)]


def membership_scores(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    answers: list[Probe],
    texts: list[str],
    reference: Any | None,
    batch_size: int | None = None,
    definitions: Definitions = OPENUNLEARNING,
) -> dict[str, list[float]]:
    """The membership scores of every example, by metric. A low score suggests that the example was trained on.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        examples: questions with answers, tokenized.
        answers: the model's probes of these answers.
        texts: the answers as text.
        reference: a model that never saw the forget set, for `mia_reference`.
        batch_size: maximum number of sequences in a batch (default: only `BATCH_TOKENS` limits a batch).
        definitions: which definitions of the metrics.
    """
    scores = {
        "mia_loss": [metrics.loss_score(answer) for answer in answers],
        "mia_zlib": [metrics.zlib_score(answer, text) for answer, text in zip(answers, texts, strict=True)],
        "mia_min_k": [metrics.min_k_score(answer, definitions=definitions) for answer in answers],
        "mia_min_k_plus_plus": [metrics.min_k_plus_plus_score(answer, definitions=definitions) for answer in answers],
        "mia_gradnorm": [
            gradnorm_score(model, tokenizer, example, definitions) for example in progress(examples, "gradients")
        ],
    }
    if reference is not None:
        # Both in the same batches: those of `answers` hold other examples, too, so they are rounded differently, and a
        # model would differ from itself.
        both = (probe(one, tokenizer, examples, batch_size, definitions.mask_pad) for one in (model, reference))
        pairs = zip(*both, strict=True)
        scores["mia_reference"] = [metrics.reference_score(*pair) for pair in pairs]
    return scores


def gradnorm_score(model: Any, tokenizer: Any, example: Example, definitions: Definitions = OPENUNLEARNING) -> float:
    """Score of `mia_gradnorm`: 2-norm of the loss's gradient, averaged over parameter tensors (arXiv 2402.17012).

    The end token counts only in the strict definition. The score is 0 if there is no other token. Dropout is off;
    OpenUnlearning leaves it on.
    """
    if definitions.drop_last:
        example = replace(example, labels=[*example.labels[:-1], IGNORED])
    if not example.tokens:
        return 0.0
    model.eval()
    model.zero_grad()
    batch = batch_of([example], tokenizer, definitions.mask_pad)
    batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
    output = forward(model, batch)
    torch.autograd.backward(token_nll(output["logits"], output["targets"]).sum() / example.tokens)
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return sum(norms) / len(norms)


def summarize(
    per_example: PerExample, retrained: PerExample | None = None, definitions: Definitions = OPENUNLEARNING
) -> dict[str, float]:
    """The benchmark's metrics, by name, as far as their values were measured.

    Args:
        per_example: what `measure` returned for the model.
        retrained: the same for the model that never saw the forget set; forget quality and PrivLeak need it.
        definitions: which definitions of the metrics, the same as for `measure`.
    """
    result: dict[str, float] = {}
    utility: list[float] = []
    for name, prefix in PREFIXES.items():
        if name in per_example:
            values = _set_metrics(name, per_example[name], definitions)
            result |= {f"{prefix}_{metric}": value for metric, value in values.items()}
            utility += values.values() if name in UTILITY_SETS else ()
    if utility:
        result["model_utility"] = metrics.model_utility(utility)
    forget = per_example["forget"]
    for metric in ("exact_memorization", "extraction_strength"):
        counted = [value for value in forget[metric] if not np.isnan(value)]  # an answer without tokens has no value
        result[metric] = float(np.mean(counted)) if counted else float("nan")
    if retrained is not None and "Truth_Ratio" in forget:
        ratios, retrained_ratios = np.array(forget["Truth_Ratio"]), np.array(retrained["forget"]["Truth_Ratio"])
        result["forget_quality"] = metrics.forget_quality(ratios, retrained_ratios)
    for attack in sorted(metric for metric in per_example.get("holdout", {}) if metric.startswith("mia_")):
        result[attack] = membership_auc(per_example, attack)
    if retrained is not None and "mia_min_k" in result and "mia_min_k" in retrained.get("holdout", {}):
        result["privleak"] = metrics.privleak(result["mia_min_k"], membership_auc(retrained, "mia_min_k"), definitions)
    return result


def _set_metrics(name: str, values: Mapping[str, Sequence[float]], definitions: Definitions) -> dict[str, float]:
    """Probability, ROUGE-L recall and truth ratio of one set, as far as their values were measured."""
    result = {
        metric: float(np.mean(values[metric])) for metric in (_probability(name), "Q_A_ROUGE") if metric in values
    }
    if "Truth_Ratio" in values:
        ratios = np.array(values["Truth_Ratio"])
        forget = name == "forget"
        result["Truth_Ratio"] = (
            metrics.truth_ratio_forget(ratios, definitions) if forget else metrics.truth_ratio_retain(ratios)
        )
    return result


def membership_auc(per_example: PerExample, attack: str) -> float:
    """AUC of a membership score between the forget set and the holdout set."""
    return metrics.auc(np.array(per_example["forget"][attack]), np.array(per_example["holdout"][attack]))
