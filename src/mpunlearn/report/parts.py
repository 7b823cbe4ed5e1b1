"""What a page consists of. The template knows these parts, and nothing of runs, metrics or audits."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    value: float | None = None
    """What a column of numbers is sorted by; None if the cell has no number."""
    note: str = ""
    """A second, smaller line."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    number: bool = False
    """Whether it holds numbers, which are aligned and sorted as such."""


@dataclass(frozen=True)
class Table:
    """A table. The first cell of a row is its header."""

    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[tuple[Cell, ...]]


@dataclass(frozen=True)
class Mark:
    """One value on the scale of a card."""

    label: str
    value: float
    kind: str
    """Its symbol: before, after, retrained or bound."""
    text: str


@dataclass(frozen=True)
class Card:
    """A number of the summary, on a scale from 0 to 1."""

    title: str
    big: str
    note: str
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Line:
    """One line of a figure."""

    label: str
    points: tuple[tuple[float, float], ...]
    """(x, y), in order."""
    style: int
    """Index of its color, dashes and marker."""


@dataclass(frozen=True)
class Figure:
    """A line figure."""

    title: str
    about: str
    """The figure in words, for whoever cannot see it."""
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    reference: tuple[str, float] | None = None
    """A horizontal line: its label and value."""


@dataclass(frozen=True)
class Quote:
    """One question and its answers: each a label and a text."""

    title: str
    question: str
    answers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Event:
    """One entry of the record."""

    time: str
    text: str


@dataclass(frozen=True)
class Section:
    """One section of a page. Parts that are empty are left out."""

    id: str
    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()
    """Tables that are folded away on a screen; on paper they are shown."""
    quotes: tuple[Quote, ...] = ()
    events: tuple[Event, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    """Pairs of a name and a value."""


@dataclass(frozen=True)
class Page:
    """A whole page."""

    party: str
    """Whose page it is: server or client."""
    title: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    """What stands beside the title: names and values."""
    cards: tuple[Card, ...]
    answers: tuple[tuple[str, tuple[str, ...]], ...]
    """The summary in words: a heading, and sentences."""
    sections: tuple[Section, ...] = field(default_factory=tuple)
