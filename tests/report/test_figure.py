"""Figures: labels that do not overlap, axes that hold their values, and SVG that is well-formed."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as some

from mpunlearn.report.figure import LABEL_GAP, domain, spread, svg, ticks
from mpunlearn.report.parts import Figure, Line

PLACES = some.lists(some.floats(0, 200), max_size=6)
VALUES = some.lists(some.floats(-3, 40), min_size=1, max_size=8)


@given(PLACES)
def test_labels_keep_their_order_and_do_not_overlap(places: list[float]) -> None:
    moved = spread(places, 0, 200)
    order = sorted(range(len(places)), key=places.__getitem__)
    assert all(moved[b] - moved[a] >= LABEL_GAP - 0.11 for a, b in pairwise(order))
    assert all(-0.1 <= place <= 200.1 for place in moved)
    if all(b - a >= LABEL_GAP for a, b in pairwise(sorted(places))):
        assert all(abs(a - b) <= 0.06 for a, b in zip(places, moved, strict=True))


@given(VALUES)
def test_an_axis_holds_all_values(values: list[float]) -> None:
    low, high, step = domain(values)
    assert low <= min(values)
    assert high >= max(values)
    assert 2 <= len(ticks(low, high, step)) <= 8
    assert low <= ticks(low, high, step)[-1] <= high + 1e-6


def test_axes_begin_at_zero_unless_all_values_are_high() -> None:
    assert domain([0.01, 0.99])[:2] == (0.0, 1.0)
    assert domain([0.83, 0.99])[:2] == (0.8, 1.0)
    assert domain([0.95, 0.99])[:2] == (0.8, 1.0)
    assert domain([0.75, 1.0])[:2] == (0.7, 1.0)


@given(some.lists(some.floats(0, 1), min_size=1, max_size=7), some.text(max_size=20), some.floats(0, 1) | some.none())
def test_a_figure_is_well_formed_and_says_what_it_shows(
    values: list[float], label: str, retrained: float | None
) -> None:
    text = "".join(character for character in label if character.isprintable())
    lines = tuple(Line(text, tuple(enumerate(values)), style) for style in range(6))
    reference = None if retrained is None else (text, retrained)
    drawn = svg(Figure(f"T {text}", f"D {text}", "x", "y", lines, reference), "f")
    root = ElementTree.fromstring(drawn)
    assert root.find("title").text == f"T {text}"
    assert root.find("desc").text == f"D {text}"
    assert root.attrib["aria-labelledby"] == "f-title f-about"
    assert sum(element.get("class", "").startswith("line line-") for element in root.iter("polyline")) == 6
