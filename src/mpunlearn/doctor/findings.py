"""What a check found, and how it is reported."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mpunlearn.progress import printable
from mpunlearn.tables import aligned

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """What was checked."""
    status: Status
    """failed: a run cannot start, or would be unsafe; warning: it can, but something needs attention."""
    found: str
    advice: str = ""
    """What to do; empty if the status is ok."""


@dataclass(frozen=True)
class Health:
    """All findings, in the order of the checks."""

    findings: list[Finding]

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [finding.check for finding in self.findings if finding.status == "failed"]

    def table(self) -> str:
        """The findings as text, followed by what to do."""
        rows = [(finding.check, finding.status, printable(finding.found)) for finding in self.findings]
        advice = [
            f"{finding.check}: {printable(finding.advice)}" for finding in self.findings if finding.status != "ok"
        ]
        return "\n".join([aligned(("check", "status", "found"), rows), *(["", *advice] if advice else [])])

    def to_json(self) -> dict[str, Any]:
        """The findings as JSON."""
        return {"ready": not self.failed, "findings": [dataclasses.asdict(finding) for finding in self.findings]}


def ok(check: str, found: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    """A check whose finding does not prevent a run."""
    return Finding(check, "warning", found, advice)


def failed(check: str, found: str, advice: str) -> Finding:
    """A check whose finding prevents a run."""
    return Finding(check, "failed", found, advice)
