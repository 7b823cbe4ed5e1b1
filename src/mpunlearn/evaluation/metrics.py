"""The metrics, as plain functions of probes, texts and scores, with OpenUnlearning's definitions (arXiv 2506.12618).

Each docstring starts with the metric's name in the results. The names are OpenUnlearning's, so that numbers can be
compared. So are the definitions, unless `STRICT` ones are given, which differ where `Definitions` says. Docstrings say what
is returned if a quotient is undefined. Not covered: PrivLeak without a retrained model, for which OpenUnlearning assumes an
AUC of 0.5.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from mpunlearn import roc
from mpunlearn.evaluation.definitions import OPENUNLEARNING, Definitions
from mpunlearn.evaluation.probe import Probe

Scores = np.ndarray
"""One number per example, shape (N,), float64."""


def _mean(values: Scores) -> float:
    return float(np.mean(values))


def normalized_probability(correct: Probe, wrong: Sequence[Probe], definitions: Definitions = OPENUNLEARNING) -> float:
    """`Q_A_Prob_normalised`: p_correct / (p_correct + Σ p_wrong) of one question (TOFU, arXiv 2401.06121, section 2.2).

    It is 0 if all of these probabilities underflow to 0.
    """
    total = correct.probability + sum(option.probability for option in wrong) + definitions.epsilon
    return 0.0 if total == 0 else correct.probability / total


def truth_ratio(correct: Probe, wrong: Sequence[Probe], definitions: Definitions = OPENUNLEARNING) -> float:
    """`Truth_Ratio` of one question: exp(-mean_j loss(wrong_j)) / exp(-loss(correct)) (TOFU, equation 1)."""
    of_wrong = np.mean([option.loss for option in wrong])
    if definitions.epsilon:
        return float(np.exp(-of_wrong) / (correct.probability + definitions.epsilon))
    return float(np.exp(correct.loss - of_wrong))


def truth_ratio_forget(
    ratios: Scores, mean: Callable[[Scores], Any] = _mean, definitions: Definitions = OPENUNLEARNING
) -> Any:
    """`forget_Truth_Ratio`: mean of min(r, 1/r), which is 1 if correct and wrong answers are equally likely."""
    return mean(np.minimum(ratios, 1 / np.maximum(ratios + definitions.epsilon, 1e-300)))


def truth_ratio_retain(ratios: Scores, mean: Callable[[Scores], Any] = _mean) -> Any:
    """`Truth_Ratio` of the other sets: mean of max(0, 1 - r), which is 1 if only the correct answers are likely."""
    return mean(np.maximum(0, 1 - ratios))


def truth_ratio_prob_mean(ratios: Scores, mean: Callable[[Scores], Any] = _mean) -> Any:
    """`forget_Truth_Ratio_prob_mean`: mean of p / (p + p') = 1 / (1 + r), which is 1 if only the correct answers are likely.

    p' is the geometric mean over the wrong answers. This is the truth ratio of OpenUnlearning's meta-evaluation (its
    aggregator prob_mean).
    """
    return mean(1 / (1 + ratios))


def forget_quality(ratios: Scores, retrained: Scores) -> float:
    """`forget_quality`: p-value of a two-sample Kolmogorov-Smirnov test of truth ratios (TOFU, section 2.2).

    Args:
        ratios: truth ratios of the forget set under the unlearned model.
        retrained: the same under the model that never saw the forget set.
    """
    from scipy import stats

    return float(stats.ks_2samp(ratios, retrained).pvalue)


def harmonic_mean(values: Sequence[Any]) -> Any:
    """The harmonic mean of numbers, or elementwise of arrays of one shape. It is 0 where any of the values is 0 or below."""
    from scipy import stats

    return stats.hmean(np.maximum(np.broadcast_arrays(*values), 0), axis=0)


def model_utility(values: Sequence[Any]) -> Any:
    """`model_utility`: harmonic mean of probability, ROUGE-L recall and truth ratio of the utility sets.

    It is 0 if any of them is 0.
    """
    return harmonic_mean(values)


def exact_memorization(answer: Probe, definitions: Definitions = OPENUNLEARNING) -> float:
    """`exact_memorization`: fraction of answer tokens that the model ranks first (Tirumala et al., arXiv 2205.10770).

    The end token does not count. NaN if there is no other token, which only OpenUnlearning's definition allows.
    """
    matches = _matches_without_end(answer, definitions)
    return float(matches.mean()) if len(matches) else float("nan")


def extraction_strength(answer: Probe, definitions: Definitions = OPENUNLEARNING) -> float:
    """`extraction_strength`: 1 - k/n, for the shortest prefix of k tokens after which every token is ranked first.

    Carlini et al., arXiv 2012.07805. n is the number of answer tokens, without the end token. If the last of them is not
    ranked first, the strength is 0 in the strict definition and 1/n in OpenUnlearning's; without a token it is 0.
    """
    matches = _matches_without_end(answer, definitions)
    if not len(matches):
        return 0.0
    mismatches = np.flatnonzero(~matches)
    prefix = mismatches[-1] + 1 if len(mismatches) else 0
    longest = len(matches) - 1 if definitions.unmatched_strength else len(matches)
    return float(1 - min(prefix, longest) / len(matches))


def _matches_without_end(answer: Probe, definitions: Definitions) -> np.ndarray:
    dropped = definitions.drop_last or (answer.ends and len(answer.matches) > 1)
    return answer.matches[:-1] if dropped else answer.matches


def loss_score(answer: Probe) -> float:
    """Score of `mia_loss`: the mean loss per token, in nats (Yeom et al., arXiv 1709.01604)."""
    return answer.loss


def zlib_score(answer: Probe, text: str) -> float:
    """Score of `mia_zlib`: the loss divided by the text's zlib-compressed bytes (Carlini et al., arXiv 2012.07805)."""
    return answer.loss / len(zlib.compress(text.encode()))


def reference_score(answer: Probe, reference: Probe) -> float:
    """Score of `mia_reference`: the loss minus that under a reference model (Carlini et al., arXiv 2112.03570)."""
    return answer.loss - reference.loss


def min_k_score(answer: Probe, share: float = 0.4, definitions: Definitions = OPENUNLEARNING) -> float:
    """Score of `mia_min_k`: minus the mean of the lowest log-probabilities (Shi et al., arXiv 2310.16789).

    The end token counts only in the strict definition.

    Args:
        answer: the probe of one text.
        share: fraction of tokens that count as lowest; at least one token does.
        definitions: which definition. OpenUnlearning's is 0 for a text of a single token.
    """
    return -_mean_of_lowest(answer.logprobs, share, definitions)


def min_k_plus_plus_score(answer: Probe, share: float = 0.4, definitions: Definitions = OPENUNLEARNING) -> float:
    """Score of `mia_min_k_plus_plus`: min-k of log-probabilities that are standardized per token (arXiv 2404.02936).

    From each, the mean of log p under the model's prediction at that position is subtracted, and the difference is
    divided by the standard deviation. Otherwise as for `min_k_score`.
    """
    return -_mean_of_lowest((answer.logprobs - answer.mean) / np.maximum(answer.deviation, 1e-3), share, definitions)


def _mean_of_lowest(values: np.ndarray, share: float, definitions: Definitions) -> float:
    values = values[:-1] if definitions.drop_last else values
    if not len(values):
        return 0.0
    return float(np.sort(values)[: max(1, int(len(values) * share))].mean())


def auc(forget: Scores, holdout: Scores) -> float:
    """`mia_…`: the area under the ROC curve of a membership score.

    This is the probability that a random holdout example scores above a random forget example, with ties counting half.
    It is 1 if the score separates the two sets perfectly, and 1/2 if it is no better than chance.
    """
    return roc.auc(holdout, forget)


def privleak(model_auc: Any, retrained_auc: Any, definitions: Definitions = OPENUNLEARNING) -> Any:
    """`privleak`: 100 · ((1 - AUC) - (1 - AUC_retrained)) / (1 - AUC_retrained) (MUSE, arXiv 2407.06460, section 3.1).

    If the retrained model's AUC is 1, the quotient is undefined: NaN in the strict definition. In OpenUnlearning's, it is
    0 if the model's AUC is 1, too, and otherwise of the order of 1e12.
    """
    rest = 1 - np.asarray(retrained_auc, dtype=np.float64) + definitions.epsilon
    return (100 * (retrained_auc - model_auc) / np.where(rest == 0, np.nan, rest))[()]


def rouge_l(reference: str, text: str) -> tuple[float, float]:
    """ROUGE-L recall and F1 of a text against a reference, with stemming (Lin 2004; the `rouge-score` library)."""
    score = _scorer()(reference, text)["rougeL"]
    return float(score.recall), float(score.fmeasure)


@cache
def _scorer() -> Callable[[str, str], Any]:
    from rouge_score.rouge_scorer import RougeScorer

    score: Callable[[str, str], Any] = RougeScorer(["rougeL"], use_stemmer=True).score
    return score
