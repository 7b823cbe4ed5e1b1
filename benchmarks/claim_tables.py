"""Tables and figures of `claim.py`: each arm compared with its baseline, averaged over paired seeds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from claim_arms import Arm
from mpunlearn.tables import markdown

SCORES = (
    "forget_Q_A_Prob",
    "forget_Q_A_ROUGE",
    "forget_Truth_Ratio",
    "retain_Q_A_Prob",
    "retain_Q_A_ROUGE",
    "model_utility",
)


@dataclass(frozen=True)
class Difference:
    """The comparison of an arm with its baseline, over the seeds available for both."""

    seeds: int
    percent: dict[str, float]
    """Mean change of each score, as a percentage of the baseline's."""
    mean: float
    """Mean change over all scores, in percent. Negative values mean a loss."""
    interval: float
    """Half the width of the 95 % confidence interval of `mean` over paired seeds."""
    absolute: float
    """Mean absolute deviation over all scores, in percentage points."""
    weights: float
    """Mean relative distance between the weights."""


def differences(rows: list[dict[str, Any]], arms: list[Arm]) -> dict[tuple[str, str], Difference]:
    """Compares each arm with its baseline; the keys are (objective, arm)."""
    at = {(row["objective"], row["arm"], row["seed"]): row for row in rows}
    compared = {}
    for objective in dict.fromkeys(row["objective"] for row in rows):
        for arm in arms:
            seeds = sorted(seed for o, a, seed in at if (o, a) == (objective, arm.name))
            pairs = [
                (at[objective, arm.name, seed], at[objective, arm.baseline, seed])
                for seed in seeds
                if (objective, arm.baseline, seed) in at
            ]
            if not pairs or arm.name == arm.baseline:
                continue
            change = np.array([[row[score] - free[score] for score in SCORES] for row, free in pairs])
            level = np.array([[free[score] for score in SCORES] for _, free in pairs]).mean(axis=0)
            per_seed = (100 * change / level).mean(axis=1)
            half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(per_seed) if len(pairs) > 1 else float("nan")
            compared[objective, arm.name] = Difference(
                seeds=len(pairs),
                percent=dict(zip(SCORES, (100 * change.mean(axis=0) / level).tolist(), strict=True)),
                mean=float(per_seed.mean()),
                interval=float(half),
                absolute=float(100 * np.abs(change).mean()),
                weights=float(np.mean([row["weights"] for row, _ in pairs])),
            )
    return compared


def table(compared: dict[tuple[str, str], Difference], arms: list[Arm]) -> str:
    """One row per arm: the mean change over scores for each objective, and the means over objectives."""
    objectives = list(dict.fromkeys(objective for objective, _ in compared))
    rows = []
    for arm in arms:
        by_objective = {o: compared[o, arm.name] for o in objectives if (o, arm.name) in compared}
        if by_objective:
            cells = [
                f"{by_objective[o].mean:+.1f} ± {by_objective[o].interval:.1f}" if o in by_objective else ""
                for o in objectives
            ]
            of_arm = list(by_objective.values())
            mean, absolute, weights = (
                float(np.mean([getattr(d, name) for d in of_arm])) for name in ("mean", "absolute", "weights")
            )
            rows.append([arm.name, *cells, f"{mean:+.2f}", f"{absolute:.2f}", f"{weights:.2f}"])
    return markdown(["arm", *objectives, "mean", "absolute, points", "weights"], rows)


def by_score(compared: dict[tuple[str, str], Difference], arms: list[Arm]) -> str:
    """One row per arm: the mean change of each score over objectives."""
    rows = []
    for arm in arms:
        of_arm = [difference for (_, name), difference in compared.items() if name == arm.name]
        if of_arm:
            rows.append([arm.name, *(f"{np.mean([d.percent[score] for d in of_arm]):+.2f}" for score in SCORES)])
    return markdown(["arm", *SCORES], rows)


def figure(compared: dict[tuple[str, str], Difference], arms: list[Arm], file: Path) -> None:
    """Plots the mean change over scores of every arm, one point per objective, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [arm.name for arm in arms if any(name == arm.name for _, name in compared)]
    picture, axes = pyplot.subplots(figsize=(9, 0.3 * len(names) + 1.5))
    objectives = list(dict.fromkeys(objective for objective, _ in compared))
    for number, objective in enumerate(objectives):
        at = [n for n, name in enumerate(names) if (objective, name) in compared]
        points = [compared[objective, names[n]] for n in at]
        heights = [n + 0.08 * (number - len(objectives) / 2) for n in at]
        axes.errorbar(
            [d.mean for d in points], heights, xerr=[d.interval for d in points], fmt="o", ms=3, lw=0.8, label=objective
        )
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("change relative to noise-free in percent (mean over scores, 95 % confidence interval over seeds)")
    axes.legend(fontsize=7, ncol=2)
    picture.tight_layout()
    for suffix in ("png", "svg"):
        picture.savefig(file.with_suffix(f".{suffix}"), dpi=150)
    pyplot.close(picture)
