"""Every metric against values worked out by hand, and the aggregates against slow second implementations."""

import itertools
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpunlearn.evaluation import metrics
from mpunlearn.evaluation.definitions import STRICT
from mpunlearn.evaluation.probe import Probe


def probe_of(probabilities: list[float], matches: list[bool] | None = None, ends: bool = False) -> Probe:
    logprobs = np.log(np.array(probabilities))
    zeros = np.zeros(len(probabilities))
    return Probe(logprobs, np.array(matches or [True] * len(probabilities)), zeros, zeros + 1, ends)


def test_probability_is_the_geometric_mean_of_token_probabilities() -> None:
    assert probe_of([0.5, 0.125]).loss == pytest.approx(2 * math.log(2))
    assert probe_of([0.5, 0.125]).probability == pytest.approx(0.25)


def test_probability_among_options() -> None:
    correct, wrong = probe_of([0.5, 0.125]), [probe_of([0.5]), probe_of([0.25, 0.25])]
    assert metrics.normalized_probability(correct, wrong) == pytest.approx(0.25 / (0.25 + 0.5 + 0.25))
    hopeless = Probe(np.array([-1e6]), np.array([False]), np.zeros(1), np.ones(1), False)
    assert metrics.normalized_probability(hopeless, [hopeless]) == 0
    assert metrics.normalized_probability(hopeless, [hopeless], STRICT) == 0


def test_truth_ratio_averages_losses_not_probabilities() -> None:
    correct, wrong = probe_of([0.25]), [probe_of([0.5]), probe_of([0.125])]
    # Geometric mean of 1/2 and 1/8 is 1/4; the arithmetic one would be 5/16.
    assert metrics.truth_ratio(correct, wrong) == pytest.approx(1.0)
    assert metrics.truth_ratio(correct, wrong[:1]) == pytest.approx(2.0)


def test_truth_ratios_are_summarized_by_what_is_wanted_of_each_set() -> None:
    ratios = np.array([0.5, 2.0, 1.0])
    assert metrics.truth_ratio_forget(ratios) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert metrics.truth_ratio_retain(ratios) == pytest.approx((0.5 + 0 + 0) / 3)
    assert metrics.truth_ratio_forget(np.array([0.0])) == 0


@given(st.lists(st.floats(0.01, 1), min_size=9, max_size=9))
def test_utility_is_a_harmonic_mean(values: list[float]) -> None:
    slow = len(values) / sum(1 / value for value in values)
    assert metrics.model_utility(values) == pytest.approx(slow)
    assert metrics.model_utility([*values, 0.0]) == 0


def slow_forget_quality(ours: list[float], theirs: list[float]) -> float:
    """The exact p-value: the share of all ways to split the values whose distributions are as far apart."""

    def distance(one: list[float], other: list[float]) -> float:
        return max(
            abs(sum(v <= x for v in one) / len(one) - sum(v <= x for v in other) / len(other)) for x in one + other
        )

    values, observed = ours + theirs, distance(ours, theirs)
    far = ways = 0
    for chosen in itertools.combinations(range(len(values)), len(ours)):
        one = [values[i] for i in chosen]
        other = [value for i, value in enumerate(values) if i not in chosen]
        ways += 1
        far += distance(one, other) >= observed - 1e-12
    return far / ways


@given(st.lists(st.integers(0, 10**6), min_size=9, max_size=9, unique=True))
@settings(max_examples=25, deadline=None)
def test_forget_quality_is_the_kolmogorov_smirnov_test(values: list[int]) -> None:
    ours, theirs = [float(v) for v in values[:5]], [float(v) for v in values[5:]]
    fast = metrics.forget_quality(np.array(ours), np.array(theirs))
    assert fast == pytest.approx(slow_forget_quality(ours, theirs))


@pytest.mark.parametrize(
    ("matches", "ends", "exact", "strength"),
    [
        ([True, True, True, True], False, 1.0, 1.0),
        ([False, True, True, True], False, 0.75, 0.75),
        ([True, False, True, True], False, 0.75, 0.5),
        ([True, True, True, False], False, 0.75, 0.0),
        ([False, False], False, 0.0, 0.0),
        ([True, False, True, False], True, 2 / 3, 1 / 3),  # the end token does not count
        ([True, True, False, True], True, 2 / 3, 0.0),
        ([False], True, 0.0, 0.0),
    ],
)
def test_memorization(matches: list[bool], ends: bool, exact: float, strength: float) -> None:
    answer = probe_of([0.5] * len(matches), matches, ends)
    assert metrics.exact_memorization(answer, STRICT) == pytest.approx(exact)
    assert metrics.extraction_strength(answer, STRICT) == pytest.approx(strength)


def test_membership_scores_by_hand() -> None:
    answer = probe_of([0.5, 0.25, 0.125, 1.0, 1.0])
    assert metrics.loss_score(answer) == pytest.approx(6 * math.log(2) / 5)
    assert metrics.zlib_score(answer, "abc") == pytest.approx(6 * math.log(2) / 5 / len(zlib.compress(b"abc")))
    assert metrics.reference_score(answer, probe_of([0.5])) == pytest.approx(math.log(2) / 5)
    assert metrics.min_k_score(answer, definitions=STRICT) == pytest.approx(2.5 * math.log(2))  # the lowest two of five
    assert metrics.min_k_score(answer, 0.01, STRICT) == pytest.approx(3 * math.log(2))  # at least one
    spread = Probe(np.array([-1.0, -2.0]), np.array([True, True]), np.array([-3.0, -1.0]), np.array([2.0, 0.5]), False)
    # (-1 + 3) / 2 = 1 and (-2 + 1) / 0.5 = -2
    assert metrics.min_k_plus_plus_score(spread, definitions=STRICT) == pytest.approx(2.0)


scores = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12)


@given(scores, scores)
def test_auc_is_the_share_of_pairs_in_order(forget: list[float], holdout: list[float]) -> None:
    slow = sum((h > f) + 0.5 * (h == f) for f in forget for h in holdout) / (len(forget) * len(holdout))
    assert metrics.auc(np.array(forget), np.array(holdout)) == pytest.approx(slow)


def test_privleak() -> None:
    assert metrics.privleak(1.0, 0.5) == pytest.approx(-100)
    assert metrics.privleak(0.5, 0.5) == 0
    assert metrics.privleak(0.25, 0.5) == pytest.approx(50)
    assert math.isnan(metrics.privleak(0.5, 1.0, STRICT))


def test_rouge() -> None:
    # Longest common subsequence of 3 words, with stemming: wrote/wrote, books/book.
    recall, f1 = metrics.rouge_l("she wrote many books", "she wrote one book yesterday")
    assert recall == pytest.approx(3 / 4)
    assert f1 == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert metrics.rouge_l("a b", "") == (0, 0)
