"""Composite scores against the published table, and their behavior at the ends of the scale."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.evaluation import composite, metrics

# TOFU forget10, Llama-3.2-1B: docs/data/method_results.json of github.com/gnueaj/unlearning-depth-score (arXiv 2605.24614).
# 1 - ES, 1 - EM, 1 - paraphrase probability, 1 - truth ratio; sMIA of loss, zlib, min-k, min-k++; UDS; relative utility;
# then memorization, privacy without and with UDS, and overall with UDS.
PUBLISHED = {
    "retrained": [0.94103, 0.40987, 0.94493, 0.43291, 1, 1, 1, 1, 1, 1, 0.58218, 1, 1, 0.80696],
    "AltPO": [
        *(0.94847, 0.40510, 0.95407, 0.48638, 0.80990, 0.94498, 0.82637, 0.88830, 0.83186, 0.95538),
        *(0.60359, 0.86416, 0.84770, 0.77257),
    ],
    "NPO": [
        *(0.93806, 0.43898, 0.97171, 0.44767, 0.57992, 0.74748, 0.57427, 0.67657, 0.81791, 0.98945),
        *(0.60542, 0.63678, 0.71607, 0.73911),
    ],
    "RMU": [
        *(0.95976, 0.63219, 0.98364, 0.42214, 0.69644, 0.71067, 0.59942, 0.89452, 0.66715, 0.54172),
        *(0.66564, 0.71058, 0.68818, 0.62482),
    ],
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_published_scores_follow_from_their_parts(method: str) -> None:
    parts, mia, (uds, utility), expected = (
        PUBLISHED[method][slice(*ends)] for ends in ((0, 4), (4, 8), (8, 10), (10, 14))
    )
    names = ("extraction_strength", "exact_memorization", "forget_Q_A_PARA_Prob", "forget_Truth_Ratio_prob_mean")
    model = {name: 1 - part for name, part in zip(names, parts, strict=True)}
    retrained = dict.fromkeys(composite.ATTACKS, 0.5)
    # An AUC whose sMIA is s lies at 0.5 · (1 + 1 - s) or on the other side of the retrained one.
    model |= {attack: 0.5 * (2 - s) for attack, s in zip(composite.ATTACKS, mia, strict=True)}
    model |= {"UDS": uds, "model_utility": 0.6 * utility}
    found = composite.scores(model, retrained, {"model_utility": 0.6})
    scores = [
        found[f"{name}"] for name in ("memorization_score", "privacy_score", "privacy_score_UDS", "overall_score_UDS")
    ]
    assert scores == pytest.approx(expected, abs=2e-5)
    assert found["utility_score"] == pytest.approx(utility)
    three = [expected[0], expected[1], utility]
    assert found["overall_score"] == pytest.approx(3 / sum(1 / value for value in three), abs=2e-5)


def test_scores_without_their_parts_are_left_out() -> None:
    assert composite.scores({"model_utility": 0.5}, None, None) == {}
    aucs = dict.fromkeys(composite.ATTACKS, 0.5)
    assert set(composite.scores(aucs, aucs, None)) == {"privacy_score"}
    assert set(composite.scores(aucs, None, None)) == set()


def test_one_failure_makes_the_harmonic_mean_zero() -> None:
    assert metrics.harmonic_mean([0.5, 0.0]) == 0
    assert metrics.harmonic_mean([0.5, -0.1]) == 0
    assert math.isnan(metrics.harmonic_mean([0.5, math.nan]))
    assert metrics.harmonic_mean([np.array([0.5, 0.0]), 0.25]) == pytest.approx([1 / 3, 0])


@given(st.floats(0, 1), st.floats(0.01, 1))
def test_closeness_is_largest_at_the_retrained_auc(auc: float, retrained: float) -> None:
    found = composite.closeness(auc, retrained)
    assert 0 <= found <= 1 == composite.closeness(retrained, retrained)
    assert found == pytest.approx(max(0.0, 1 - abs(auc - retrained) / retrained))
    assert composite.closeness(auc, 0.0) == 0


def test_the_truth_ratio_of_the_score_is_a_probability() -> None:
    correct, wrong = np.array([0.4, 0.1]), np.array([0.1, 0.3])
    assert metrics.truth_ratio_prob_mean(wrong / correct) == pytest.approx((0.8 + 0.25) / 2)
    with np.errstate(divide="ignore"):
        assert metrics.truth_ratio_prob_mean(np.array([np.inf])) == 0
