"""Line figures as inline SVG.

Written by hand rather than by a plotting library: plotly weighs 4.5 MB inline and Vega-Lite about 0.8 MB, and neither
follows the page's theme or prints it crisply without help. These figures have a few lines with a few points each, and need
a few kilobytes. Colors are CSS classes, so that one file serves light, dark and print. Lines also differ in dashes and
markers, and carry their labels themselves.

Not covered: logarithmic scales, and more lines than there are styles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mpunlearn.report.parts import Figure, Line

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 36, 118, 12, 40
LABEL_GAP = 15.0
"""Minimum distance between two labels, in pixels of the drawing."""
STYLES = 5
"""Number of styles of lines in the style sheet."""


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)


def svg(figure: Figure, name: str) -> Markup:
    """A figure as an `svg` element.

    Args:
        figure: what to draw.
        name: prefix of the ids of its title and description, unique in the page.
    """
    points = [point for line in figure.lines for point in line.points]
    low, high, step = domain(_values(figure))
    x = _Scale(0, max((x for x, _ in points), default=1) or 1, LEFT, WIDTH - RIGHT)
    y = _Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-about">').format(
            WIDTH, HEIGHT, name, name
        ),
        Markup('<title id="{}-title">{}</title><desc id="{}-about">{}</desc>').format(
            name, figure.title, name, figure.about
        ),
        *_axes(figure, x, y, ticks(low, high, step)),
    ]
    ends: list[tuple[float, str, str]] = []
    if figure.reference is not None:
        label, value = figure.reference
        parts.append(
            Markup('<line class="reference" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
                LEFT, y(value), WIDTH - RIGHT, y(value)
            )
        )
        ends.append((y(value), label, "reference"))
    for line in figure.lines:
        parts += _line(line, x, y)
        ends.append((y(line.points[-1][1]), line.label, f"line-{line.style % STYLES}"))
    return Markup("").join([*parts, *_labels(ends), Markup("</svg>")])


def start(figure: Figure) -> float:
    """Where the vertical axis of a figure begins."""
    return domain(_values(figure))[0]


def _values(figure: Figure) -> list[float]:
    return [y for line in figure.lines for _, y in line.points] + ([figure.reference[1]] if figure.reference else [])


def domain(values: Sequence[float]) -> tuple[float, float, float]:
    """The range of an axis for values in [0, 1], and the distance of its ticks.

    The range ends at 1 and begins at 0, unless all values are close to 1: then it begins at the next tenth below them.
    Values above 1 extend it.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    start = 0.0 if low < 0.7 else min(0.8, math.floor(low * 10 - 0.1) / 10)
    end = 1.0 if high <= 1 else float(math.ceil(high))
    start = start if low >= 0 else float(math.floor(low))
    step = 0.05 if end - start <= 0.3 else 0.2 if end - start <= 1 else (end - start) / 5
    return start, end, step


def ticks(low: float, high: float, step: float) -> list[float]:
    """The values of an axis' ticks."""
    return [round(low + index * step, 6) for index in range(math.floor((high - low) / step + 1e-9) + 1)]


def _axes(figure: Figure, x: _Scale, y: _Scale, values: Sequence[float]) -> list[Markup]:
    parts = []
    for value in values:
        parts.append(Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            LEFT, y(value), WIDTH - RIGHT, y(value)
        ))  # fmt: skip
        parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{:g}</text>').format(
            LEFT - 7, y(value) + 4, value
        ))  # fmt: skip
    whole = range(0, int(x.high) + 1, max(1, math.ceil(x.high / 10)))
    for number in whole:
        parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            x(number), HEIGHT - BOTTOM + 17, number
        ))  # fmt: skip
    parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, figure.x_label
    ))  # fmt: skip
    return parts


def _line(line: Line, x: _Scale, y: _Scale) -> list[Markup]:
    """A line with a marker at each point."""
    style = line.style % STYLES
    path = " ".join(f"{x(a)},{y(b)}" for a, b in line.points)
    parts = [Markup('<polyline class="line line-{}" points="{}"/>').format(style, path)]
    for a, b in line.points:
        parts.append(
            Markup('<g class="marker line-{}" transform="translate({} {})">{}<title>{}</title></g>').format(
                style, x(a), y(b), _MARKERS[style], f"{line.label}, {a:g}: {b:.3f}"
            )
        )
    return parts


_MARKERS = tuple(
    Markup(shape)
    for shape in (
        '<circle r="3.6"/>',
        '<rect x="-3.2" y="-3.2" width="6.4" height="6.4"/>',
        '<path d="M0-4.4 4.1 3.3H-4.1Z"/>',
        '<path d="M0-4.6 4.6 0 0 4.6-4.6 0Z"/>',
        '<path d="M0 4.4 4.1-3.3H-4.1Z"/>',
    )
)


def _labels(ends: Sequence[tuple[float, str, str]]) -> list[Markup]:
    """The labels at the right end of the lines, moved apart where they would overlap."""
    parts = []
    places = spread([place for place, _, _ in ends], TOP + 4, HEIGHT - BOTTOM)
    for (place, label, style), moved in zip(ends, places, strict=True):
        first, last = WIDTH - RIGHT + 6, WIDTH - RIGHT + 18
        parts.append(Markup('<polyline class="leader {}" points="{},{} {},{}"/>').format(
            style, first, place, last, moved
        ))  # fmt: skip
        parts.append(Markup('<text class="label" x="{}" y="{}">{}</text>').format(last + 4, moved + 4, label))
    return parts


def spread(places: Sequence[float], low: float, high: float) -> list[float]:
    """Moves places apart to at least `LABEL_GAP`, within a range, in their order and as little as possible.

    Places that are closer are merged into a block whose middle is the mean of its members; the range gives way if there is
    no room for all.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    blocks: list[list[int]] = []

    def first_of(block: list[int]) -> float:
        middle = sum(places[index] for index in block) / len(block)
        extent = (len(block) - 1) * LABEL_GAP
        return max(low, min(middle - extent / 2, high - extent))

    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and first_of(blocks[-2]) + len(blocks[-2]) * LABEL_GAP > first_of(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = dict.fromkeys(range(len(places)), 0.0)
    for block in blocks:
        for rank, index in enumerate(block):
            moved[index] = round(first_of(block) + rank * LABEL_GAP, 1)
    return list(moved.values())
