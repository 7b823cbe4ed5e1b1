"""Limits on measured values: their form, and which of them are met."""

import math

import pytest

from mpunlearn.errors import PlanError
from mpunlearn.requirements import Requirement, parse_requirements, violated

KNOWN = ["membership-auc", "spelling"]


def test_requirements_are_read_and_checked() -> None:
    requirements = parse_requirements(" membership-auc<0.7, spelling > 1e-2", KNOWN)
    assert requirements == [Requirement("membership-auc", "<", 0.7), Requirement("spelling", ">", 0.01)]
    assert [str(requirement) for requirement in requirements] == ["membership-auc<0.7", "spelling>0.01"]
    assert violated(requirements, {"membership-auc": 0.69, "spelling": 0.02}) == []
    assert violated(requirements, {"membership-auc": 0.7, "spelling": 0.01}) == requirements
    assert violated(requirements, {"membership-auc": math.nan, "spelling": math.nan}) == requirements


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected name<number or name>number"),
        ("membership-auc<", "found 'membership-auc<'"),
        ("membership-auc=0.7", "found 'membership-auc=0.7'"),
        ("membership-auc<much", "found 'membership-auc<much'"),
        ("membership-auc<inf", "found 'membership-auc<inf'"),
        ("membership-auc<0.7,", "found ''"),
        ("auc<1,tpr<1,spelling<1", "unknown: auc, tpr; known: membership-auc, spelling"),
    ],
)
def test_a_requirement_with_a_mistake_is_none(text: str, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        parse_requirements(text, KNOWN)
