"""What the checks of a copy measure, and which values they allow."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """One value that was measured on a copy."""

    check: str
    """One of `CHECKS`."""
    value: float
    where: str
