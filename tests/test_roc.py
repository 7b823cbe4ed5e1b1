"""The ROC summaries, against counting by hand."""

import numpy as np
import pytest

from mpunlearn import roc


def test_the_auc_counts_pairs() -> None:
    assert roc.auc([3, 2], [1, 0]) == 1
    assert roc.auc([0, 1], [2, 3]) == 0
    assert roc.auc([1, 3], [1, 2]) == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    random = np.random.default_rng(0)
    one, two = random.normal(size=30), random.normal(size=40) - 0.5
    assert roc.auc(one, two) == pytest.approx(np.mean(one[:, None] > two[None]))
    assert np.isnan(roc.auc([1, np.nan], [0]))


def test_the_true_positive_rate_lets_few_negatives_through() -> None:
    negative = list(range(200))
    assert roc.true_positive_rate([197, 198, 199, 200], negative) == 0.75  # 198 and 199 may exceed the threshold, 197
    assert roc.true_positive_rate([198, 199], negative, 0.0) == 0
    assert roc.true_positive_rate([5, 6, 7], [5.5, 1]) == pytest.approx(2 / 3)  # with few negatives, none exceeds
    assert roc.true_positive_rate([5, 5], [5, 5]) == 0
