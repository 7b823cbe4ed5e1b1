"""Composite scores: memorization, privacy and utility in one number, so that methods can be ranked.

The scores are those by which OpenUnlearning ranks methods (arXiv 2506.12618, appendix), with the details of the code and the
published table of arXiv 2605.24614 (github.com/gnueaj/unlearning-depth-score); a test reproduces rows of that table. All
scores are between 0 and 1, except that utility can exceed 1, and higher is better. A harmonic mean is close to the lowest of
its values, so a method cannot make up for one failure with another strength.

In that table Privacy also includes UDS, which OpenUnlearning does not know. Both are reported: `privacy_score` without it, and
`privacy_score_UDS` if UDS was measured.

Utility is relative to the original model's. Both sources take the harmonic mean of model utility and fluency, which needs a
classifier (see `fluency`). Without one, utility is model utility alone. Not covered: the scores of MUSE, but for privacy.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mpunlearn.evaluation.bootstrap import Number
from mpunlearn.evaluation.metrics import harmonic_mean

ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
"""The membership inference attacks that Privacy consists of."""


def memorization_score(strength: Number, exact: Number, paraphrase: Number, truth: Number) -> Number:
    """`memorization_score`: harmonic mean of 1 - ES, 1 - EM, 1 - paraphrase probability and 1 - truth ratio.

    Args:
        strength: mean extraction strength.
        exact: mean exact memorization.
        paraphrase: mean probability of the paraphrased answers.
        truth: mean of p / (p + p'), with p' the geometric mean over the wrong answers.
    """
    return harmonic_mean([1 - strength, 1 - exact, 1 - paraphrase, 1 - truth])


def closeness(auc: Number, retrained: Number) -> Number:
    """The sMIA of one attack: 1 - |AUC - AUC_retrained| / AUC_retrained, clipped to [0, 1].

    It is 1 if the attack tells as much as on the retrained model, and 0 if the retrained model's AUC is 0. Source: `_s_mia` in
    uds/privacy_eval.py of arXiv 2605.24614's code. An earlier version of that code divided by |AUC_full - AUC_retrained|.
    """
    auc, retrained = np.asarray(auc, dtype=np.float64), np.asarray(retrained, dtype=np.float64)
    distance = np.abs(auc - retrained) / np.where(retrained > 0, retrained, 1)
    return np.where(retrained > 0, np.clip(1 - distance, 0, 1), 0.0)[()]


def privacy_score(aucs: Sequence[Number], retrained: Sequence[Number]) -> Number:
    """`privacy_score`: harmonic mean of sMIA over `ATTACKS`.

    Args:
        aucs: AUC of each attack on the model.
        retrained: AUC of each attack on the model that never saw the forget set.
    """
    return harmonic_mean([closeness(*pair) for pair in zip(aucs, retrained, strict=True)])


def scores(
    model: Mapping[str, Number], retrained: Mapping[str, Number] | None, original: Mapping[str, Number] | None
) -> dict[str, Number]:
    """The composite scores, as far as their parts were measured.

    Args:
        model: the metrics of the model, by name.
        retrained: those of the model that never saw the forget set. Privacy needs them.
        original: those of the model before unlearning. Utility, and therefore the overall score, needs them.
    """
    result: dict[str, Number] = {}
    parts = ("extraction_strength", "exact_memorization", "forget_Q_A_PARA_Prob", "forget_Truth_Ratio_prob_mean")
    if all(part in model for part in parts):
        result["memorization_score"] = memorization_score(*(model[part] for part in parts))
    if retrained is not None and all(attack in model and attack in retrained for attack in ATTACKS):
        attacks = [[metrics[attack] for attack in ATTACKS] for metrics in (model, retrained)]
        result["privacy_score"] = privacy_score(*attacks)
        if "UDS" in model:
            result["privacy_score_UDS"] = harmonic_mean([result["privacy_score"], model["UDS"]])
    if original is not None and "model_utility" in model and "model_utility" in original:
        divisor = np.asarray(_utility(original), dtype=np.float64)
        result["utility_score"] = (_utility(model) / np.where(divisor > 0, divisor, np.nan))[()]
    if "memorization_score" in result and "utility_score" in result:
        for privacy in [name for name in result if name.startswith("privacy_score")]:
            three = [result["memorization_score"], result[privacy], result["utility_score"]]
            result[privacy.replace("privacy", "overall")] = harmonic_mean(three)
    return result


def _utility(metrics: Mapping[str, Number]) -> Number:
    """Model utility, or its harmonic mean with fluency if that was measured."""
    parts = [metrics[name] for name in ("model_utility", "forget_Q_A_gibberish") if name in metrics]
    return harmonic_mean(parts)
