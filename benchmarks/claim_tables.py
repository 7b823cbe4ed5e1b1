"""Tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from claim_arms import Arm

SCORES = (
    "forget_probability",
    "forget_rouge_l_recall",
    "forget_truth_ratio",
    "retain_probability",
    "retain_rouge_l_recall",
    "model_utility",
)


@dataclass(frozen=True)
class Difference:
    """An arm against its baseline, over the seeds that both have."""

    seeds: int
    percent: dict[str, float]
    """Mean change of each score, as a percentage of the baseline's."""
    mean: float
    """Mean over scores, percent; negative is a loss."""
    interval: float
    """Half the width of its 95 % interval over paired seeds."""
    absolute: float
    """Mean absolute deviation of all scores, points."""
    weights: float


def differences(rows: list[dict[str, Any]], arms: list[Arm]) -> dict[tuple[str, str], Difference]:
    """(objective, arm) → how it compares with its baseline."""
    at = {(row["objective"], row["arm"], row["seed"]): row for row in rows}
    found = {}
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
            change = np.array([[mine[score] - free[score] for score in SCORES] for mine, free in pairs])
            level = np.array([[free[score] for score in SCORES] for _, free in pairs]).mean(axis=0)
            per_seed = (100 * change / level).mean(axis=1)
            half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(per_seed) if len(pairs) > 1 else float("nan")
            found[objective, arm.name] = Difference(
                seeds=len(pairs),
                percent=dict(zip(SCORES, (100 * change.mean(axis=0) / level).tolist(), strict=True)),
                mean=float(per_seed.mean()),
                interval=float(half),
                absolute=float(100 * np.abs(change).mean()),
                weights=float(np.mean([mine["weights"] for mine, _ in pairs])),
            )
    return found


def table(found: dict[tuple[str, str], Difference], arms: list[Arm]) -> str:
    """One line per arm: each objective's mean change over scores, and the means over objectives."""
    objectives = list(dict.fromkeys(objective for objective, _ in found))
    lines = [
        f"| arm | {' | '.join(objectives)} | mean | absolute, points | weights |",
        "|---|" + "---|" * (len(objectives) + 3),
    ]
    for arm in arms:
        mine = {objective: found[objective, arm.name] for objective in objectives if (objective, arm.name) in found}
        if not mine:
            continue
        cells = [f"{mine[o].mean:+.1f} ± {mine[o].interval:.1f}" if o in mine else "" for o in objectives]
        every = list(mine.values())
        means = [float(np.mean([getattr(d, name) for d in every])) for name in ("mean", "absolute", "weights")]
        lines.append(f"| {arm.name} | {' | '.join(cells)} | {means[0]:+.2f} | {means[1]:.2f} | {means[2]:.2f} |")
    return "\n".join(lines)


def by_score(found: dict[tuple[str, str], Difference], arms: list[Arm]) -> str:
    """One line per arm: the change of each score, a mean over objectives."""
    lines = [f"| arm | {' | '.join(name.replace('_', ' ') for name in SCORES)} |", "|---|" + "---|" * len(SCORES)]
    for arm in arms:
        mine = [difference for (_, name), difference in found.items() if name == arm.name]
        if mine:
            means = [float(np.mean([difference.percent[score] for difference in mine])) for score in SCORES]
            lines.append(f"| {arm.name} | {' | '.join(f'{value:+.2f}' for value in means)} |")
    return "\n".join(lines)


def figure(found: dict[tuple[str, str], Difference], arms: list[Arm], file: Path) -> None:
    """Mean change over scores of every arm, a point per objective; PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [arm.name for arm in arms if any(name == arm.name for _, name in found)]
    picture, axes = pyplot.subplots(figsize=(9, 0.3 * len(names) + 1.5))
    objectives = list(dict.fromkeys(objective for objective, _ in found))
    for number, objective in enumerate(objectives):
        at = [n for n, name in enumerate(names) if (objective, name) in found]
        mine = [found[objective, names[n]] for n in at]
        places = [n + 0.08 * (number - len(objectives) / 2) for n in at]
        axes.errorbar(
            [d.mean for d in mine], places, xerr=[d.interval for d in mine], fmt="o", ms=3, lw=0.8, label=objective
        )
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("change against noise-free, percent (mean over scores, 95 % interval over seeds)")
    axes.legend(fontsize=7, ncol=2)
    picture.tight_layout()
    for suffix in ("png", "svg"):
        picture.savefig(file.with_suffix(f".{suffix}"), dpi=150)
    pyplot.close(picture)
