"""TOFU's metrics, memorization and membership inference on the question sets of a benchmark.

`measure` runs a model and returns one value per example; `summarize` turns these values into the benchmark's metrics.
They are separate because forget quality and PrivLeak compare two models, and the values of each model are cached.

Model utility combines probability, ROUGE-L recall and truth ratio of three sets. Forget quality compares the forget
set's truth ratios under the two models (arXiv 2401.06121, section 2.2). The metrics of memorization and membership
inference, and all names, are OpenUnlearning's (arXiv 2506.12618); `composite` combines them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mpunlearn.evaluation import composite, metrics
from mpunlearn.evaluation.bootstrap import EVERYTHING, Sample
from mpunlearn.evaluation.definitions import OPENUNLEARNING, Definitions
from mpunlearn.evaluation.depth import unlearning_depth
from mpunlearn.evaluation.fluency import Judge
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
UTILITY_METRICS = ("Q_A_Prob", "Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
"""Metrics of a set that model utility is computed from."""
DROP = "drop_"
"""Prefix of the log-likelihood drops of a layer, which `UDS` is computed from."""
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
    judge: Judge | None = None,
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
        judge: says how fluent generated answers are.

    Returns:
        For each set the loss (nats per token), `Q_A_Prob` or `Q_A_Prob_normalised`, `Q_A_ROUGE` and `Truth_Ratio`; for
        sets with paraphrases `Q_A_PARA_Prob`, the same for them; for the forget set also `Q_A_PARA_ROUGE` and the
        memorization metrics; for the forget and the holdout set also the membership scores.
    """
    encoded = {name: questions.encoded(tokenizer, definitions, data) for name, questions in sets.items()}
    mask_pad = definitions.mask_pad
    examples: list[Example] = []
    moments: list[bool] = []
    for name, tokenized in encoded.items():
        several = _all_examples(tokenized)
        scored = len(tokenized.answers) if membership and name in ("forget", "holdout") else 0
        examples += several
        moments += [number < scored for number in range(len(several))]
    probes = iter(probe(model, tokenizer, examples, batch_size, mask_pad, moments))
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
            if not shared:
                values["Q_A_PARA_Prob"] = [answer.probability for answer in correct]
        if name == "forget":
            values["exact_memorization"] = [metrics.exact_memorization(a, definitions) for a in answers[name]]
            values["extraction_strength"] = [metrics.extraction_strength(a, definitions) for a in answers[name]]
        per_example[name] = values
    if texts:
        names = [name for name in sets if name != "holdout"]
        prompts = [prompt for name in names for prompt in encoded[name].prompts]
        generated = iter(generate(model, tokenizer, prompts, max_new_tokens, batch_size, mask_pad))
        for name in names:
            own = [next(generated) for _ in sets[name].answers]
            per_example[name]["Q_A_ROUGE"] = _recall(sets[name].answers, own)
            if name == "forget" and "Q_A_PARA_Prob" in per_example[name]:
                per_example[name]["Q_A_PARA_ROUGE"] = _recall(sets[name].paraphrases, own)
            if name == "forget" and judge is not None:
                per_example[name]["Q_A_gibberish"] = judge(own)
    if membership and "holdout" in sets:
        for name in ("forget", "holdout"):
            examples, written = encoded[name].answers, sets[name].answers
            if definitions.prompt_alone:
                written = [answer_text(example, tokenizer) for example in examples]
            per_example[name] |= membership_scores(
                model, tokenizer, examples, answers[name], written, reference, batch_size, definitions
            )
    return per_example


def _recall(answers: Sequence[str], generated: Sequence[str]) -> list[float]:
    """ROUGE-L recall of each generated text."""
    return [metrics.rouge_l(*pair)[0] for pair in zip(answers, generated, strict=True)]


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
    scores = likelihood_scores(answers, texts, definitions)
    gradients = progress(examples, "gradients")
    scores["mia_gradnorm"] = [gradnorm_score(model, tokenizer, example, definitions) for example in gradients]
    if reference is not None:
        # Both in the same batches: those of `answers` hold other examples, too, so they are rounded differently, and a
        # model would differ from itself.
        both = (probe(one, tokenizer, examples, batch_size, definitions.mask_pad) for one in (model, reference))
        pairs = zip(*both, strict=True)
        scores["mia_reference"] = [metrics.reference_score(*pair) for pair in pairs]
    return scores


def likelihood_scores(
    answers: list[Probe], texts: list[str], definitions: Definitions = OPENUNLEARNING
) -> dict[str, list[float]]:
    """Those membership scores that follow from the likelihoods of texts under one model, by metric."""
    return {
        "mia_loss": [metrics.loss_score(answer) for answer in answers],
        "mia_zlib": [metrics.zlib_score(answer, text) for answer, text in zip(answers, texts, strict=True)],
        "mia_min_k": [metrics.min_k_score(answer, definitions=definitions) for answer in answers],
        "mia_min_k_plus_plus": [metrics.min_k_plus_plus_score(answer, definitions=definitions) for answer in answers],
    }


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
    per_example: PerExample,
    retrained: PerExample | None = None,
    original: PerExample | None = None,
    sample: Sample = EVERYTHING,
    definitions: Definitions = OPENUNLEARNING,
) -> dict[str, Any]:
    """The benchmark's metrics, by name, as far as their values were measured.

    Args:
        per_example: what `measure` returned for the model.
        retrained: the same for the model that never saw the forget set; forget quality, PrivLeak, UDS and the
            privacy score need it.
        original: the same for the model before unlearning; the overall score needs it.
        sample: how often each example counts.
        definitions: which definitions of the metrics, the same as for `measure`.

    Returns:
        Numbers or, for resamples, arrays of shape (B,).
    """
    result: dict[str, Any] = {}
    utility: list[Any] = []
    for name, prefix in PREFIXES.items():
        if name in per_example:
            values = _set_metrics(name, per_example[name], sample, definitions)
            result |= {f"{prefix}_{metric}": value for metric, value in values.items()}
            utility += [values[metric] for metric in UTILITY_METRICS if metric in values and name in UTILITY_SETS]
    if utility:
        result["model_utility"] = metrics.model_utility(utility)
    forget = per_example["forget"]
    for metric in ("exact_memorization", "extraction_strength"):
        result[metric] = sample.mean_of_defined("forget", forget[metric])  # an answer without tokens has no value
    for metric in (metric for metric in forget if metric.startswith("leak@")):
        result[metric] = sample.mean("forget", forget[metric])
    if retrained is not None and "Truth_Ratio" in forget:
        result["forget_quality"] = sample.forget_quality(forget["Truth_Ratio"], retrained["forget"]["Truth_Ratio"])
    for attack in sorted(metric for metric in per_example.get("holdout", {}) if metric.startswith("mia_")):
        result[attack] = membership_auc(per_example, attack, sample)
    if retrained is not None and f"{DROP}0" in forget and f"{DROP}0" in retrained["forget"]:
        result["UDS"] = sample.mean_of_defined("forget", unlearning_depth(_drops(retrained), _drops(per_example)))
    theirs = None if retrained is None else summarize(retrained, sample=sample, definitions=definitions)
    before = None if original is None else summarize(original, sample=sample, definitions=definitions)
    if theirs is not None and "mia_min_k" in result and "mia_min_k" in theirs:
        result["privleak"] = metrics.privleak(result["mia_min_k"], theirs["mia_min_k"], definitions)
    return result | composite.scores(result, theirs, before)


def _set_metrics(
    name: str, values: Mapping[str, Sequence[float]], sample: Sample, definitions: Definitions
) -> dict[str, Any]:
    """Probability, ROUGE-L recall and truth ratio of one set, as far as their values were measured."""
    means = (_probability(name), "Q_A_ROUGE", "Q_A_PARA_Prob", "Q_A_PARA_ROUGE", "Q_A_WORST_ROUGE", "Q_A_gibberish")
    result = {metric: sample.mean(name, values[metric]) for metric in means if metric in values}
    if "Truth_Ratio" in values:
        ratios, mean = np.array(values["Truth_Ratio"]), partial(sample.mean, name)
        if name == "forget":
            result["Truth_Ratio"] = metrics.truth_ratio_forget(ratios, mean, definitions)
            result["Truth_Ratio_prob_mean"] = metrics.truth_ratio_prob_mean(ratios, mean)
        else:
            result["Truth_Ratio"] = metrics.truth_ratio_retain(ratios, mean)
    return result


def _drops(per_example: PerExample) -> np.ndarray:
    """What `likelihood_drops` returned, shape (N, layers)."""
    layers = sum(metric.startswith(DROP) for metric in per_example["forget"])
    return np.array([per_example["forget"][f"{DROP}{layer}"] for layer in range(layers)]).T


def membership_auc(per_example: PerExample, attack: str, sample: Sample = EVERYTHING) -> Any:
    """AUC of a membership score between the forget set and the holdout set."""
    return sample.auc(per_example["forget"][attack], per_example["holdout"][attack])
