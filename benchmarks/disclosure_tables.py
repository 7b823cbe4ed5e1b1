"""The table and the figure of `disclosure.py`."""

import statistics
from pathlib import Path

from disclosure_arms import ARMS
from mpunlearn.tables import markdown

HEADER = ("world", "objective", "arm", "seed", "floor", "error", "task_error", "forget", "retain")
FREE = "noise-free"
Row = dict[str, str]


def deviation(row: Row, free: Row) -> float:
    """The mean absolute difference of the forget and retain probabilities, in points."""
    return statistics.mean(100 * abs(float(row[key]) - float(free[key])) for key in ("forget", "retain"))


def grouped(rows: list[Row]) -> dict[tuple[str, str, str], tuple[dict[str, float], float, int]]:
    """(world, objective, arm) → means over seeds, mean deviation from noise-free at the same seed, and number of seeds."""
    free = {(row["world"], row["objective"], row["seed"]): row for row in rows if row["arm"] == FREE}
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if (row["world"], row["objective"], row["seed"]) in free:
            groups.setdefault((row["world"], row["objective"], row["arm"]), []).append(row)
    return {
        key: (
            {column: statistics.mean(float(row[column]) for row in group) for column in HEADER[4:]},
            statistics.mean(deviation(row, free[row["world"], row["objective"], row["seed"]]) for row in group),
            len(group),
        )
        for key, group in sorted(groups.items(), key=lambda item: item[0][:2])
    }


def table(rows: list[Row]) -> str:
    """One row per world and arm, with means over seeds; a cell for each objective, with deviation, forget and retain."""
    groups = grouped(rows)
    objectives = list(dict.fromkeys(objective for _, objective, _ in groups))
    lines = []
    for world, arm in dict.fromkeys((world, arm) for world, _, arm in groups):
        found = {objective: groups[key] for objective in objectives if (key := (world, objective, arm)) in groups}
        means = [mean for mean, *_ in found.values()]
        shares = [f"{statistics.mean(mean[name] for mean in means):.1%}" for name in ("floor", "error", "task_error")]
        cells = [
            f"{found[objective][1]:.1f} ({found[objective][0]['forget']:.3f}, {found[objective][0]['retain']:.3f})"
            if objective in found
            else ""
            for objective in objectives
        ]
        lines.append(
            [world, arm, *shares, *cells, "/".join(str(found[o][2]) if o in found else "0" for o in objectives)]
        )
    columns = ["floor", "error", "error/‖task vector‖", *objectives, "seeds"]
    return markdown(["world", "arm", *columns], lines)


def figure(rows: list[Row], file: Path) -> None:
    """Plots the deviation against the attack error, one line per design, means over objectives and seeds, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "disclosure"
    from matplotlib import pyplot

    groups = grouped(rows)
    names = list(dict.fromkeys(world for world, *_ in groups))
    picture, panels = pyplot.subplots(1, max(1, len(names)), figsize=(5 * max(1, len(names)), 4), squeeze=False)
    for name, axes in zip(names, panels[0], strict=False):
        designs: dict[str, list[tuple[float, float]]] = {}
        for arm in dict.fromkeys(arm for world, _, arm in groups if world == name and arm != FREE):
            found = [group for (world, _, other), group in groups.items() if (world, other) == (name, arm)]
            point = tuple(
                statistics.mean(values) for values in zip(*((m["error"], d) for m, d, _ in found), strict=True)
            )
            designs.setdefault(ARMS[arm]().design, []).append((100 * point[0], point[1]))
        for design, points in designs.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", ms=4, lw=1, label=design)
        axes.set_title(name)
        axes.set_xlabel("error of the strongest attack, % of the weights")
        axes.set_ylabel("deviation from noise-free, points")
        axes.legend(fontsize=7)
    picture.tight_layout()
    picture.savefig(file, metadata={"Date": None})
    pyplot.close(picture)
