"""Several checkpoints in one table and one figure, with bootstrap intervals.

All models are resampled together, so the interval of a difference is that of a paired comparison. It is often much narrower
than the intervals of the two models suggest, since some examples are harder than others for every model. Without a
correction for multiple comparisons, one in twenty intervals of equal models excludes 0.

Not covered: variation between training runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.errors import FileError, PlanError
from mpunlearn.extras import needs
from mpunlearn.tables import markdown

Intervals = Mapping[str, Sequence[float]]
"""Metric → lower and upper limit."""
NOTE = "Brackets: 95 % bootstrap intervals over examples."
STAR = " *: the paired interval of the difference to the first model excludes 0."


@dataclass(frozen=True)
class Compared:
    """A checkpoint that is compared with the evaluated one."""

    metrics: dict[str, float]
    """Metric → value."""
    intervals: dict[str, list[float]]
    """Metric → 95 % interval."""
    differences: dict[str, list[float]]
    """Metric → 95 % interval of its value minus that of the evaluated checkpoint."""
    per_example: dict[str, dict[str, list[float]]]
    """Set → metric → one value per example."""
    digest: str
    """SHA-256 (hex) of the checkpoint."""


def cell(
    value: float | None, interval: Sequence[float] | None = None, difference: Sequence[float] | None = None
) -> str:
    """A number as a table cell, with its interval; empty if it was not measured."""
    if value is None:
        return ""
    text = f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
    if interval is not None and all(map(math.isfinite, interval)):
        text += f" [{cell(interval[0])}, {cell(interval[1])}]"
    if difference is not None and (difference[0] > 0 or difference[1] < 0):
        text += " *"
    return text


def comparison_table(
    first: str,
    metrics: Mapping[str, float],
    intervals: Intervals,
    others: Mapping[str, Compared],
    retrained: Mapping[str, float] | None,
) -> str:
    """A Markdown table with one column for each checkpoint, and the retrained model last."""
    header = ["metric", first, *others, *([] if retrained is None else ["retrained"])]
    rows = [
        [
            name,
            cell(value, intervals.get(name)),
            *(cell(o.metrics.get(name), o.intervals.get(name), o.differences.get(name)) for o in others.values()),
            *([] if retrained is None else [cell(retrained.get(name))]),
        ]
        for name, value in metrics.items()
    ]
    return f"{markdown(header, rows)}\n\n{NOTE}{STAR if others else ''}"


def check_figure(path: Path) -> None:
    """Refuses a figure that cannot be drawn, before anything is measured.

    Raises:
        MissingPackageError: matplotlib is not installed.
        PlanError: the file type is not svg, png or pdf.
        FileError: the file exists.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise PlanError(f"--figure {path}: expected a name that ends in .svg, .png or .pdf")
    if path.exists() or path.is_symlink():
        raise FileError(f"--figure {path}: already exists; name another file, or remove this one")
    needs("figures", "--figure")


def draw(
    path: Path, models: Mapping[str, tuple[Mapping[str, float], Intervals]], retrained: Mapping[str, float] | None
) -> None:
    """Draws the metrics between 0 and 1, one row each, with a point and an interval for each checkpoint.

    Args:
        path: the new file; see `check_figure`.
        models: label → metrics and their intervals. The metrics of the first model are drawn.
        retrained: the metrics of the retrained model, drawn as black lines.

    Raises:
        FileError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    first = next(iter(models.values()))[0]
    drawn = [*(values for values, _ in models.values()), *([] if retrained is None else [retrained])]
    names = [name for name in first if all(0 <= values.get(name, 0) <= 1 for values in drawn)]
    figure = Figure(figsize=(8, 1.2 + (0.16 + 0.14 * len(models)) * len(names)), layout="constrained")
    axes: Any = figure.add_subplot()
    for number, (label, (values, intervals)) in enumerate(models.items()):
        shift = (number - (len(models) - 1) / 2) * 0.7 / len(models)
        rows = [(row + shift, name) for row, name in enumerate(names) if name in values]
        axes.plot([values[name] for _, name in rows], [y for y, _ in rows], "o", ms=4, color=f"C{number}", label=label)
        for y, name in rows:
            if name in intervals and all(map(math.isfinite, intervals[name])):
                axes.plot(intervals[name], [y, y], color=f"C{number}", lw=1.5)
    for row, name in enumerate(names):
        if retrained is not None and name in retrained:
            named = {"label": "retrained"} if row == 0 else {}
            axes.plot([retrained[name]] * 2, [row - 0.4, row + 0.4], color="black", lw=1, **named)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5), xlabel="value, with 95 % bootstrap interval")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise FileError(f"--figure {path}: cannot be written: {error.strerror}; name another file") from error
