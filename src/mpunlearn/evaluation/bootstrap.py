"""How metrics are aggregated over examples: once over all of them, or over many resamples for a confidence interval.

Every metric of a benchmark is built from three aggregates: a mean over the examples of a set, the AUC between two sets,
and the p-value of a Kolmogorov-Smirnov test. `summarize` of `tofu` and `muse` ask a `Sample` for them. `EVERYTHING` counts
each example once and yields numbers. `Resampled` yields one number per resample, in arrays of shape (B,), so that a metric
and its interval have one definition, however the aggregates are combined.

The bootstrap (Efron and Tibshirani 1993, chapters 6 and 13) resamples the examples of each set with replacement. A resample
is represented by how often each example occurs in it, so that all means are one matrix product. The counts depend only on
the set's name and size. All models that are measured on a benchmark therefore get the same resamples, and their
differences are paired.

Not covered: the randomness of training and sampling, which needs several seeds; and BCa intervals. An interval of a p-value
is only a rough guide: duplicates move the two samples of the test apart, so it lies too low.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mpunlearn.evaluation import metrics

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0

Number = Any
"""A float, or an array of floats of shape (B,), one per resample."""


class Sample(Protocol):
    """How often every example of every set counts."""

    def mean(self, name: str, values: Sequence[float] | np.ndarray) -> Number:
        """Mean over the examples of a set.

        Args:
            name: the set.
            values: one value per example, shape (N,).
        """

    def mean_of_defined(self, name: str, values: Sequence[float] | np.ndarray) -> Number:
        """The same over those examples whose value is not NaN; NaN if there are none."""

    def auc(self, forget: Sequence[float], holdout: Sequence[float]) -> Number:
        """`metrics.auc` between the forget and the holdout set."""

    def forget_quality(self, ratios: Sequence[float], retrained: Sequence[float]) -> Number:
        """`metrics.forget_quality` of the forget set under two models."""


class Everything:
    """Every example counts once."""

    def mean(self, name: str, values: Sequence[float] | np.ndarray) -> Number:
        """The mean."""
        return float(np.mean(values))

    def mean_of_defined(self, name: str, values: Sequence[float] | np.ndarray) -> Number:
        """The mean without NaN."""
        defined = [value for value in values if not math.isnan(value)]
        return float(np.mean(defined)) if defined else math.nan

    def auc(self, forget: Sequence[float], holdout: Sequence[float]) -> Number:
        """The AUC."""
        return metrics.auc(np.array(forget), np.array(holdout))

    def forget_quality(self, ratios: Sequence[float], retrained: Sequence[float]) -> Number:
        """The p-value."""
        return metrics.forget_quality(np.array(ratios), np.array(retrained))


EVERYTHING = Everything()


class Resampled:
    """Every example counts as often as it was drawn in each of B resamples."""

    def __init__(self, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        """Draws nothing yet: the counts of a set are drawn when they are first needed.

        Args:
            resamples: B.
            seed: seed of the resamples.
        """
        self.resamples, self.seed = resamples, seed
        self._drawn: dict[tuple[str, int], np.ndarray] = {}

    def counts(self, name: str, size: int) -> np.ndarray:
        """How often each example of a set occurs in each resample, shape (B, N), float64. Each row sums to N."""
        if (name, size) not in self._drawn:
            random = np.random.default_rng([self.seed, zlib.crc32(name.encode()), size])
            drawn = random.multinomial(size, np.full(size, 1 / size), self.resamples)
            self._drawn[name, size] = drawn.astype(np.float64)
        return self._drawn[name, size]

    def mean(self, name: str, values: Sequence[float] | np.ndarray) -> Number:
        """The means, shape (B,)."""
        array = np.asarray(values, dtype=np.float64)
        return self.counts(name, len(array)) @ array / len(array)

    def mean_of_defined(self, name: str, values: Sequence[float] | np.ndarray) -> Number:
        """The means without NaN, shape (B,)."""
        array = np.asarray(values, dtype=np.float64)
        defined = ~np.isnan(array)
        counts = self.counts(name, len(array))[:, defined]
        total = counts.sum(axis=1)
        return np.where(total > 0, counts @ array[defined] / np.maximum(total, 1), np.nan)

    def auc(self, forget: Sequence[float], holdout: Sequence[float]) -> Number:
        """The AUCs, shape (B,): the pairs in order, weighted by how often both of their examples occur."""
        members, others = np.asarray(forget)[:, None], np.asarray(holdout)[None, :]
        ordered = (others > members) + 0.5 * (others == members)
        ordered = np.where(np.isnan(members) | np.isnan(others), np.nan, ordered)
        weighted = (self.counts("forget", len(forget)) @ ordered) * self.counts("holdout", len(holdout))
        return weighted.sum(axis=1) / ordered.size

    def forget_quality(self, ratios: Sequence[float], retrained: Sequence[float]) -> Number:
        """The p-values, shape (B,). A p-value depends only on the distance, so each distance is tested once."""
        pooled = np.concatenate((ratios, retrained))
        order = np.argsort(pooled, kind="stable")
        last = np.append(np.diff(pooled[order]) != 0, True)  # distributions are compared after each group of ties
        counts = self.counts("forget", len(ratios))
        steps = np.concatenate((counts, -counts), axis=1)[:, order]
        distances = np.abs(np.cumsum(steps, axis=1)[:, last]).max(axis=1).astype(int)
        _, first, which = np.unique(distances, return_index=True, return_inverse=True)
        times = counts.astype(int)
        p = [metrics.forget_quality(np.repeat(ratios, times[row]), np.repeat(retrained, times[row])) for row in first]
        return np.array(p)[which]


def intervals(resampled: Mapping[str, Number]) -> dict[str, list[float]]:
    """Percentile intervals.

    Args:
        resampled: metric → its value in each resample, shape (B,).

    Returns:
        Metric → lower and upper limit of its 95 % interval; NaN if some resample has no value.
    """
    tail = 100 * (1 - CONFIDENCE) / 2
    found: dict[str, list[float]] = {}
    for name, values in resampled.items():
        defined = bool(np.isfinite(values).all())
        found[name] = np.percentile(values, [tail, 100 - tail]).tolist() if defined else [math.nan, math.nan]
    return found
