"""The metrics: plain functions of probes, texts and scores, with OpenUnlearning's definitions (arXiv 2506.12618).

What they are called in the results is in the docstrings' first words. Where a definition has a corner that the usual
implementations leave open, the docstring says how it is settled.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from mpunlearn.evaluation.probe import Probe

Scores = np.ndarray


def normalized_probability(correct: Probe, wrong: Sequence[Probe]) -> float:
    """Probability among options: p_c / (p_c + Σ p_w) (TOFU, arXiv 2401.06121, section 2.2)."""
    others = sum(option.probability for option in wrong)
    return correct.probability / (correct.probability + others)


def truth_ratio(correct: Probe, wrong: Sequence[Probe]) -> float:
    """Truth ratio: exp(-mean_j loss(wrong_j)) / exp(-loss(correct)) (TOFU, equation 1)."""
    return float(np.exp(correct.loss - np.mean([option.loss for option in wrong])))


def truth_ratio_forget(ratios: Scores) -> float:
    """Mean of min(r, 1/r): 1 where right and wrong answers are equally likely."""
    return float(np.mean(np.minimum(ratios, 1 / np.maximum(ratios, 1e-300))))


def truth_ratio_retain(ratios: Scores) -> float:
    """Mean of max(0, 1 - r): 1 where only the right answer is likely."""
    return float(np.mean(np.maximum(0, 1 - ratios)))


def forget_quality(ratios: Scores, retrained: Scores) -> float:
    """Forget quality: p-value of the two-sample Kolmogorov-Smirnov test between truth ratios (TOFU, section 2.2)."""
    return float(stats.ks_2samp(ratios, retrained).pvalue)


def model_utility(values: Sequence[float]) -> float:
    """Model utility: harmonic mean of probability, ROUGE-L recall and truth ratio over the sets to be kept."""
    return 0.0 if min(values) <= 0 else float(stats.hmean(values))


def exact_memorization(answer: Probe) -> float:
    """Exact memorization: share of tokens that are the most likely ones, without the final end token (arXiv 2205.10770)."""
    return float(_without_end(answer).mean())


def extraction_strength(answer: Probe) -> float:
    """Extraction strength: 1 - k/n with k the length of the shortest prefix after which every token matches.

    Carlini et al., arXiv 2012.07805. Where not even the last token matches it is 0.
    """
    matches = _without_end(answer)
    wrong = np.flatnonzero(~matches)
    return float(1 - (wrong[-1] + 1 if len(wrong) else 0) / len(matches))


def _without_end(answer: Probe) -> np.ndarray:
    return answer.matches[:-1] if answer.ends and len(answer.matches) > 1 else answer.matches


def loss_score(answer: Probe) -> float:
    """Membership score *loss*: the mean loss (Yeom et al., arXiv 1709.01604)."""
    return answer.loss


def zlib_score(answer: Probe, text: str) -> float:
    """Membership score *zlib*: the loss by the compressed size of the text (Carlini et al., arXiv 2012.07805)."""
    return answer.loss / len(zlib.compress(text.encode()))


def reference_score(answer: Probe, reference: Probe) -> float:
    """Membership score *reference*: the loss beyond a reference model's (Carlini et al., arXiv 2112.03570)."""
    return answer.loss - reference.loss


def min_k_score(answer: Probe, share: float = 0.4) -> float:
    """Membership score *min-k*: minus the mean of the lowest log-probabilities (Shi et al., arXiv 2310.16789)."""
    return -_lowest(answer.logprobs, share)


def min_k_plus_score(answer: Probe, share: float = 0.4) -> float:
    """Membership score *min-k++*: the same of log-probabilities in units of their own spread (arXiv 2404.02936)."""
    return -_lowest((answer.logprobs - answer.mean) / np.maximum(answer.deviation, 1e-3), share)


def _lowest(values: np.ndarray, share: float) -> float:
    return float(np.sort(values)[: max(1, int(len(values) * share))].mean())


def auc(forget: Scores, holdout: Scores) -> float:
    """Area under the ROC: how often a holdout example scores above a forget example; 1/2 where nothing tells them apart."""
    ranks = stats.rankdata(np.concatenate((forget, holdout)))
    above = ranks[len(forget) :].sum() - len(holdout) * (len(holdout) + 1) / 2
    return float(above / (len(forget) * len(holdout)))


def privacy_leak(value: float, retrained: float) -> float:
    """PrivLeak: 100 · ((1 - AUC) - (1 - AUC_retrained)) / (1 - AUC_retrained) (MUSE, arXiv 2407.06460, section 3.1).

    Where the retrained model separates perfectly the quotient has no value, and NaN is returned.
    """
    return float("nan") if retrained == 1 else 100 * (retrained - value) / (1 - retrained)


def rouge_l(reference: str, text: str) -> tuple[float, float]:
    """ROUGE-L recall and F1 of a text against a reference, with stemming (Lin 2004; the `rouge-score` library)."""
    score = _scorer()(reference, text)["rougeL"]
    return float(score.recall), float(score.fmeasure)


@cache
def _scorer() -> Callable[[str, str], Any]:
    from rouge_score.rouge_scorer import RougeScorer

    found: Callable[[str, str], Any] = RougeScorer(["rougeL"], use_stemmer=True).score
    return found
