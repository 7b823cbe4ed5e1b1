"""The tables of `objectives.py`: objectives by their overall score, and which arms last longer than noise-free."""

import math
from typing import Any

import numpy as np
from scipy import stats

from mpunlearn.tables import markdown

Row = dict[str, Any]
COLUMNS = {
    "overall": "overall",
    "memorization": "memorization",
    "privacy": "privacy",
    "utility": "utility",
    "uds": "UDS",
    "leak": "leak@16",
    "relearned": "relearned",
    "relearned_elsewhere": "relearned elsewhere",
    "Q": "Q",
    "seconds": "CPU s",
}
"""Column → its header."""
LASTING = {
    "relearned": "probability after relearning",
    "relearned_elsewhere": "after relearning elsewhere",
    "R": "R",
    "Q": "Q",
    "leak": "leak@16",
    "uds": "UDS",
}


def report(search: list[Row], results: list[Row]) -> str:
    """All tables, for every world."""
    parts = []
    for world in dict.fromkeys(row["world"] for row in results):
        found = [row for row in search if row["world"] == world]
        rows = [row for row in results if row["world"] == world]
        parts += [
            f"## {world}",
            ranking(rows),
            "### Difference from noise-free",
            lasting(rows),
            "### Search",
            searched(found),
        ]
    return "\n\n".join(parts)


def ranking(rows: list[Row]) -> str:
    """One line per objective and arm, highest overall score first, with 95 % intervals over seeds for that score."""
    lines = []
    for key in dict.fromkeys((row["objective"], row["arm"]) for row in rows):
        group = [row for row in rows if (row["objective"], row["arm"]) == key]
        means = {column: _mean(row[column] for row in group) for column in COLUMNS}
        cells = [f"{means[column]:.0f}" if column == "seconds" else f"{means[column]:.3f}" for column in COLUMNS]
        cells[0] += f" ± {half_width([row['overall'] for row in group]):.3f}"
        lines.append((means["overall"], [key[0] or "—", key[1], str(len(group)), *cells]))
    lines.sort(key=lambda line: -line[0] if math.isfinite(line[0]) else 1.0)
    return markdown(("objective", "arm", "seeds", *COLUMNS.values()), [cells for _, cells in lines])


def lasting(rows: list[Row]) -> str:
    """For each objective and arm with at least two seeds: the mean difference from noise-free over paired seeds."""
    at = {(row["objective"], row["arm"], row["seed"]): row for row in rows}
    lines = []
    for objective, arm in dict.fromkeys((row["objective"], row["arm"]) for row in rows):
        pairs = [
            (at[objective, arm, seed], at[objective, "noise-free", seed])
            for o, a, seed in at
            if (o, a) == (objective, arm) and (objective, "noise-free", seed) in at
        ]
        if arm == "noise-free" or len(pairs) < 2:
            continue
        cells = []
        for column in LASTING:
            values = [row[column] - free[column] for row, free in pairs]
            cells.append(f"{_mean(values):+.3f} ± {half_width(values):.3f}")
        lines.append([objective, arm, str(len(pairs)), *cells])
    return markdown(("objective", "arm", "seeds", *LASTING.values()), lines)


def searched(rows: list[Row]) -> str:
    """The best pair of each objective and what it reached in the search."""
    from objectives import best

    lines = []
    for objective in dict.fromkeys(row["objective"] for row in rows):
        group = [row for row in rows if row["objective"] == objective]
        row = best(group)
        numbers = [f"{row[column]:.3f}" for column in ("overall", "memorization", "privacy", "utility")]
        lines.append([objective, str(len(group)), f"{row['rate']:g}", f"{row['gamma']:g}", *numbers])
    lines.sort(key=lambda line: line[4], reverse=True)
    return markdown(
        ("objective", "pairs", "learning rate", "γ", "overall", "memorization", "privacy", "utility"), lines
    )


def half_width(values: list[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean (Student's t); NaN for fewer than two values."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else math.nan


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
