"""Resamples give what the metrics themselves give on repeated examples, and cover what they should."""

import numpy as np
import pytest

from mpunlearn.evaluation import metrics, tofu
from mpunlearn.evaluation.bootstrap import EVERYTHING, Resampled, intervals


class Once(Resampled):
    """A resample in which every example occurs once."""

    def counts(self, name: str, size: int) -> np.ndarray:
        return np.ones((1, size))


def values(seed: int, size: int = 12) -> tofu.PerExample:
    """Random values for a whole benchmark."""
    random = np.random.default_rng(seed)

    def some(*names: str) -> dict[str, list[float]]:
        return {name: random.random(size).tolist() for name in names}

    common = ("Q_A_ROUGE", "Truth_Ratio")
    mia = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
    memorization = ("exact_memorization", "extraction_strength", "Q_A_PARA_Prob", "leak@1", "drop_0", "drop_1")
    return {
        "forget": some("Q_A_Prob", *common, *memorization, *mia),
        "retain": some("Q_A_Prob", *common),
        "real_authors": some("Q_A_Prob_normalised", *common),
        "world_facts": some("Q_A_Prob_normalised", *common),
        "holdout": some(*mia),
    }


def test_a_resample_with_every_example_once_gives_the_metrics_themselves() -> None:
    model, retrained, original = values(0), values(1), values(2)
    whole = tofu.summarize(model, retrained, original)
    once = tofu.summarize(model, retrained, original, Once())
    assert set(whole) == set(once)
    assert {"overall_score", "overall_score_UDS", "UDS", "leak@1", "privleak", "forget_quality"} <= set(whole)
    for name, value in whole.items():
        assert once[name].shape == (1,)
        assert once[name][0] == pytest.approx(value, abs=1e-12), name


def test_resampled_aggregates_are_those_of_the_repeated_examples() -> None:
    random = np.random.default_rng(0)
    sample, sizes = Resampled(20), {"forget": 9, "holdout": 7}
    forget, retrained = (random.integers(0, 6, 9).astype(float) for _ in range(2))
    holdout = random.integers(0, 6, 7).astype(float)
    drawn = {name: sample.counts(name, size).astype(int) for name, size in sizes.items()}
    partly = np.where(forget > 3, np.nan, forget)
    found = (
        sample.mean("forget", forget),
        sample.mean_of_defined("forget", partly),
        sample.auc(forget, holdout),
        sample.forget_quality(forget, retrained),
    )
    for row in range(20):
        f, h = (np.repeat(v, drawn[n][row]) for n, v in (("forget", forget), ("holdout", holdout)))
        again = np.repeat(retrained, drawn["forget"][row])
        assert (len(f), len(h)) == (9, 7)
        slow = (f.mean(), EVERYTHING.mean_of_defined("", np.repeat(partly, drawn["forget"][row])))
        slow += (metrics.auc(f, h), metrics.forget_quality(f, again))
        assert [column[row] for column in found] == pytest.approx(list(slow), nan_ok=True)


def test_a_score_that_is_not_a_number_makes_the_auc_none() -> None:
    sample = Resampled(seed=0)
    assert np.isnan(EVERYTHING.auc([0.1, np.nan], [0.2]))
    assert np.isnan(sample.auc([0.1, np.nan], [0.2])).all()
    assert np.isnan(sample.auc([0.1], [np.nan, 0.2])).all()


def test_models_share_their_resamples_and_seeds_differ() -> None:
    one, same, other = Resampled(5), Resampled(5), Resampled(5, seed=1)
    assert np.array_equal(one.counts("forget", 8), same.counts("forget", 8))
    assert not np.array_equal(one.counts("forget", 8), other.counts("forget", 8))
    assert not np.array_equal(one.counts("forget", 8), one.counts("retain", 8))
    difference = one.mean("forget", np.arange(8) + 0.5) - same.mean("forget", np.arange(8))
    assert difference == pytest.approx([0.5] * 5)  # paired: a constant difference has no spread


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    random = np.random.default_rng(3)
    data = random.random(400)
    low, high = intervals({"mean": Resampled().mean("forget", data)})["mean"]
    error = 1.96 * data.std() / 20
    assert (low, high) == pytest.approx((data.mean() - error, data.mean() + error), abs=0.1 * error)
    assert np.isnan(intervals({"mean": np.array([0.5, np.nan])})["mean"]).all()
