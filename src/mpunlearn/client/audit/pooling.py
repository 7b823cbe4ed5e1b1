"""Pools the measurements of all copies into the report.

The copies of a round have independent noise, so scores that are measured on each copy and then averaged separate better
than those of any single copy, and better than scores of the averaged update. The server has all copies, so this is what
it can do.

Not covered: copies of earlier rounds, which the server can pool as well.
"""

from collections.abc import Sequence

import numpy as np

from mpunlearn import roc
from mpunlearn.client.audit.report import GROUPS, ClientAudit, CopyScores, LayerSpelling, Separation, TokenLeak
from mpunlearn.errors import UpdateError


def pooled(copies: Sequence[CopyScores]) -> ClientAudit:
    """Averages the scores of all copies and summarizes them.

    Args:
        copies: the scores of at least one copy, all with the same texts.

    Raises:
        UpdateError: the copies were not trained alike.
    """
    first = copies[0]
    parts = [(list(copy.tokens), [layer.label for layer in copy.spelling]) for copy in copies]
    if any(others != parts[0] for others in parts):
        raise UpdateError("the updates change different weights; expected copies of one round, all trained alike")
    mean = {
        "floor": _mean([copy.drop for copy in copies]),
        "membership": _mean([copy.ridge for copy in copies]),
        "cosine": _mean([copy.cosine for copy in copies]),
    }
    separations = {
        score: {
            group: Separation(
                roc.auc(texts["forget"], texts[group]), roc.true_positive_rate(texts["forget"], texts[group])
            )
            for group in GROUPS
            if group in texts
        }
        for score, texts in mean.items()
    }
    ridge = mean["membership"]
    return ClientAudit(
        updates=len(copies),
        texts={group: len(values) for group, values in first.drop.items()},
        separations=separations,
        retain_auc=roc.auc(-ridge["retain"], -ridge["reference"]) if {"retain", "reference"} <= ridge.keys() else None,
        tokens={label: _token_leak([copy.tokens[label] for copy in copies]) for label in first.tokens},
        spelling=[_mean_spelling(layers) for layers in zip(*(copy.spelling for copy in copies), strict=True)],
    )


def _mean(copies: Sequence[dict[str, list[float]]]) -> dict[str, np.ndarray]:
    return {group: np.mean([copy[group] for copy in copies], axis=0) for group in copies[0]}


def _token_leak(copies: Sequence[list[list[float]]]) -> TokenLeak:
    used, others = (np.mean([copy[side] for copy in copies], axis=0) for side in (0, 1))
    largest = np.argsort(-np.concatenate((used, others)), kind="stable")[: len(used)]
    return TokenLeak(
        auc=roc.auc(used, others),
        precision=float((largest < len(used)).mean()),
        chance=len(used) / (len(used) + len(others)),
    )


def _mean_spelling(layers: Sequence[LayerSpelling]) -> LayerSpelling:
    controls = [layer.control for layer in layers if layer.control is not None]
    return LayerSpelling(
        label=layers[0].label,
        rank=max(layer.rank for layer in layers),
        dimensions=layers[0].dimensions,
        exact=float(np.mean([layer.exact for layer in layers])),
        next_token=float(np.mean([layer.next_token for layer in layers])),
        control=float(np.mean(controls)) if controls else None,
    )
