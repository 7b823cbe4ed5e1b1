"""Averages over rounds what single rounds give.

Source: the noise of every round is drawn anew while the model changes little between rounds, so that the mean over R
rounds leaves 1/√R of it.
Threat model: a client holds one copy of each round, such as one of several replicas of the client does
(`--assign one`), or an estimate of θ from each round.

Not covered: following the model's change from round to round; what is estimated is the mean of the rounds' models.
"""

from collections.abc import Sequence

from mpunlearn.audit.alignment import Alignment, align
from mpunlearn.audit.attacks.cancel import REALIGNMENTS, combine
from mpunlearn.audit.weights import Model


def rounds(estimates: Sequence[Model]) -> Model:
    """The mean of the estimates, in the coordinates of the first.

    Args:
        estimates: one copy or one estimate from each round, at least 2.
    """
    equal = [1 / len(estimates)] * len(estimates)
    maps = [Alignment(estimates[0].architecture), *(align(estimates[0], other) for other in estimates[1:])]
    for _ in range(REALIGNMENTS):
        mean = combine(estimates, maps, equal)
        maps = [align(mean, estimate, known, passes=1) for estimate, known in zip(estimates, maps, strict=True)]
    return combine(estimates, maps, equal)
