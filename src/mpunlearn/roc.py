"""How well a score separates two groups of examples: the usual summaries of an ROC curve.

Scores are plain numbers, larger for what the score takes for a positive. Both functions depend only on the order of the
scores, so no threshold has to be chosen. Not covered: confidence intervals.
"""

from collections.abc import Sequence

import numpy as np

Scores = Sequence[float] | np.ndarray
"""One number per example."""


def auc(positive: Scores, negative: Scores) -> float:
    """The area under the ROC curve: the probability that a random positive scores above a random negative.

    Ties count half. It is 1 if the score separates the groups perfectly, and 1/2 if it is no better than chance,
    and NaN if a score is NaN.
    """
    if np.isnan(positive).any() or np.isnan(negative).any():
        return float("nan")
    ordered = np.sort(np.asarray(negative, dtype=np.float64))
    above = sum(np.searchsorted(ordered, positive, side).sum() for side in ("left", "right")) / 2
    return float(above / (len(positive) * len(negative)))


def true_positive_rate(positive: Scores, negative: Scores, false_positive_rate: float = 0.01) -> float:
    """The share of positives above a threshold that at most this share of the negatives exceeds.

    At 1 %, the measure of membership inference that Carlini et al. (arXiv 2112.03570) recommend. With fewer than
    1 / false_positive_rate negatives, none of them may exceed the threshold.
    """
    ordered = np.sort(np.asarray(negative, dtype=np.float64))[::-1]
    threshold = ordered[int(false_positive_rate * len(ordered))]
    return float((np.asarray(positive, dtype=np.float64) > threshold).mean())
