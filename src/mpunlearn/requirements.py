"""Limits on measured values, written as text: `membership-auc<0.7,tokens-auc<0.6`.

An audit measures values by name, and a user or a policy limits them. Not covered: limits that depend on one another.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mpunlearn.errors import PlanError

_FORM = re.compile(r"\s*([\w-]+)\s*([<>])\s*(\S+?)\s*")


@dataclass(frozen=True)
class Requirement:
    """A limit on one value."""

    name: str
    relation: str
    """< or >, both strict."""
    bound: float

    def met(self, value: float) -> bool:
        """Whether a value is within the limit; NaN is not."""
        return value < self.bound if self.relation == "<" else value > self.bound

    def __str__(self) -> str:
        return f"{self.name}{self.relation}{self.bound:g}"


def parse_requirements(text: str, known: Collection[str], option: str = "--require") -> list[Requirement]:
    """Parses comma-separated requirements.

    Args:
        text: such as "membership-auc<0.7,tokens-auc<0.6".
        known: the names that can be limited.
        option: where the text comes from, for error messages.

    Raises:
        PlanError: a part is not of the form name<number or name>number, or a name is not known.
    """
    requirements = []
    for part in text.split(","):
        match = _FORM.fullmatch(part)
        try:
            bound = float(match[3]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or not math.isfinite(bound):
            raise PlanError(f"{option}: expected name<number or name>number, separated by commas, found {part!r:.60}")
        requirements.append(Requirement(match[1], match[2], bound))
    if unknown := sorted({requirement.name for requirement in requirements} - set(known)):
        raise PlanError(f"{option}: unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return requirements


def violated(requirements: Iterable[Requirement], values: Mapping[str, float]) -> list[Requirement]:
    """The requirements that are not met.

    Args:
        requirements: the limits.
        values: the measured values by name; every limited value must have been measured.
    """
    return [requirement for requirement in requirements if not requirement.met(values[requirement.name])]
